"""Mutated checkpoints and their JSON files: the state that was written, or CheckpointError and the one before it."""

import hashlib
import io
import json
import shutil

import pytest
import torch
from mutations import VALUES, mutate_bytes, mutate_json_text, run_cases
from slow import slow_except
from tiny_run import tiny_recipe

from megabatch.app.load import load_model
from megabatch.app.state import build_state
from megabatch.comm.launch import World
from megabatch.recipe import fields_as_json
from megabatch.runtime import Runtime
from megabatch.train.checkpoint import newest_intact, open_checkpoint, write_checkpoint
from megabatch.train.precision import Precision

COUNTS = slow_except([30, 1000], 30)
RECIPE = tiny_recipe(ema_half_life_epochs=0.5)


def new_state():
    return build_state(
        RECIPE, Runtime(), Precision("fp32", torch.device("cpu")), world=World(), micro_batch_size=RECIPE.bn_span
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Two checkpoints of a tiny run."""
    folder = tmp_path_factory.mktemp("original")
    for step in (1, 2):
        facts = {"recipe": fields_as_json(RECIPE), "class_names": ("a", "b", "c", "d")}
        write_checkpoint(folder, new_state().state_dict(), **facts, step=step, epoch=0.2 * step, top1=0.5)
    return folder


def copy_of(original, tmp_path):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run" / "step-00000002.pt"


def sign(path):
    """Makes the JSON describe the present bytes, as an attacker does."""
    data, description = path.read_bytes(), path.with_suffix(".json")
    facts = {"sha256": hashlib.sha256(data).hexdigest(), "num_bytes": len(data)}
    description.write_text(json.dumps(json.loads(description.read_text()) | facts))


@pytest.mark.parametrize("count", COUNTS)
def test_flipped_bytes_are_found_and_the_checkpoint_before_is_taken(count, original, tmp_path):
    path, good = copy_of(original, tmp_path), (original / "step-00000002.pt").read_bytes()

    def case(rng):
        data = mutate_bytes(good, rng)
        path.write_bytes(data)
        assert newest_intact(path.parent)[0].step == (2 if data == good else 1)
        return data == good

    assert run_cases("checkpoints, bytes", count, case)["refused"] > 0.9 * count


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_json_beside_a_checkpoint(count, original, tmp_path):
    path = copy_of(original, tmp_path)
    description = path.with_suffix(".json")
    good = description.read_text()

    def case(rng):
        description.write_bytes(mutate_json_text(good, rng))
        assert newest_intact(path.parent)[0].step in {1, 2}
        return load_model(path).class_names is not None

    outcomes = run_cases("checkpoints, JSON", count, case)
    assert min(outcomes["accepted"], outcomes["refused"]) > 0


@pytest.mark.filterwarnings("ignore")  # torch warns of files in its older formats
@pytest.mark.parametrize("count", COUNTS)
def test_hostile_bytes_with_a_right_checksum(count, original, tmp_path):
    path, good = copy_of(original, tmp_path), (original / "step-00000002.pt").read_bytes()

    def case(rng):
        pickled = good.index(b"data.pkl") + 64  # the part that decides which objects are made
        at = rng.choice([0, pickled, len(good) - 4000])
        path.write_bytes(good[:at] + mutate_bytes(good[at:], rng))
        sign(path)
        new_state().load_state_dict(open_checkpoint(path)[1])
        return True

    outcomes = run_cases("checkpoints, signed bytes", count, case)
    assert min(outcomes["accepted"], outcomes["refused"]) > 0


def mutate_state(value, rng):
    """A copy of a state in which one entry, at any depth, is replaced, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        copied, key = dict(value), rng.choice(list(value))
        kind = rng.randrange(6)
        if kind == 0:
            del copied[key]
        elif kind == 1:
            copied[rng.choice(["x", 7, "\0"])] = rng.choice(VALUES)
        else:
            copied[key] = mutate_state(copied[key], rng)
        return copied
    if isinstance(value, list) and value:
        return [mutate_state(item, rng) if rng.random() < 0.5 else item for item in value]
    tensors = [torch.zeros(0), torch.zeros(3), torch.tensor(float("nan")), torch.zeros(2, 2, dtype=torch.int8)]
    return rng.choice(
        [rng.choice(VALUES), rng.choice(tensors), torch.zeros(1).expand(1 << 40), torch.zeros(2).to_sparse()]
    )


@pytest.mark.parametrize("count", COUNTS)
def test_hostile_states_with_a_right_checksum(count, original, tmp_path):
    path = copy_of(original, tmp_path)
    good = open_checkpoint(path)[1]

    def case(rng):
        buffer = io.BytesIO()
        torch.save(mutate_state(good, rng), buffer)
        path.write_bytes(buffer.getvalue())
        sign(path)
        load_model(path)
        new_state().load_state_dict(open_checkpoint(path)[1])
        return True

    outcomes = run_cases("checkpoints, signed states", count, case)
    assert min(outcomes["accepted"], outcomes["refused"]) > 0
