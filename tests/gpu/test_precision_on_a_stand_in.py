"""`precision=auto` on a GPU takes the faster of bf16 and fp16, by a trial of the model."""

import dataclasses
import math

import pytest
import torch
from stand_in_gpu import CUDA, StandInGpu
from tiny_run import tiny_recipe

from megabatch.app.measured import precision as module
from megabatch.app.measured import tuning
from megabatch.app.measured.precision import measured_precision
from megabatch.app.measured.trial import GradientTrial
from megabatch.app.resolve import choose_micro_batch
from megabatch.comm.launch import World
from megabatch.runtime import Runtime

ON_GPU = World(device=CUDA)
RECIPE = tiny_recipe()


@pytest.fixture(autouse=True)
def own_choices(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGABATCH_MEASURE", "1")
    tuning.use_table(tuning.Table(tmp_path / "kernels"))
    yield
    tuning.use_table(None)


def choose(runtime, world=ON_GPU):
    size = choose_micro_batch(RECIPE, runtime, world_size=1, device=CUDA)
    return measured_precision(RECIPE, runtime, world=world, micro_batch_size=size).name


def timed(seconds, asked):
    """Stands for the timer: `seconds` by precision."""
    return lambda trial: asked.append(trial.precision.name) or seconds[trial.precision.name]


@pytest.mark.parametrize(
    ("seconds", "faster"), [({"bf16": 2.0, "fp16": 1.9}, "fp16"), ({"bf16": 1.0, "fp16": 1.1}, "bf16")]
)
def test_auto_takes_the_faster_of_both_and_measures_once(monkeypatch, seconds, faster):
    asked = []
    monkeypatch.setattr(tuning, "gpu_seconds", timed(seconds, asked))
    with StandInGpu():
        assert choose(Runtime()) == faster
        tuning.use_table(tuning.Table(tuning.table().folder))  # as in the next process
        assert choose(Runtime()) == faster
        assert asked == ["bf16", "fp16"]
        choose(Runtime(fusion="plain"))
        assert len(asked) == 4


def test_a_given_precision_and_a_compiled_model_are_not_measured(monkeypatch):
    monkeypatch.setattr(tuning, "gpu_seconds", lambda _: pytest.fail("measures"))
    with StandInGpu():
        assert choose(Runtime(precision="fp16")) == "fp16"
        assert choose(Runtime(precision="fp32")) == "fp32"
        assert choose(Runtime(compile=True)) == "bf16"
    assert choose(Runtime(device="cpu"), World()) in {"bf16", "fp32"}


def test_another_worker_takes_what_the_first_one_measured(monkeypatch):
    monkeypatch.setattr(tuning, "gpu_seconds", lambda _: pytest.fail("measures"))
    monkeypatch.setattr(module, "broadcast_from_rank0", lambda *_: "fp16")
    with StandInGpu():
        assert choose(Runtime(), dataclasses.replace(ON_GPU, rank=1, world_size=2)) == "fp16"


@pytest.mark.parametrize("fusion", ["auto", "plain"])
def test_both_trials_are_replayed_from_graphs_and_leave_the_generator_alone(monkeypatch, fusion):
    pytest.importorskip("triton")
    found, drawn = [], torch.get_rng_state()
    gpu_seconds = tuning.gpu_seconds

    def noted(trial):
        seconds = gpu_seconds(trial)
        if isinstance(trial, GradientTrial):
            found.append((trial.precision.name, trial._step.num_graphs, math.isfinite(seconds)))
        return seconds

    monkeypatch.setattr(tuning, "gpu_seconds", noted)
    monkeypatch.setattr(tuning, "REPEATS", 2)
    with StandInGpu():
        choose(Runtime(fusion=fusion))
    assert found == [("bf16", 1, True), ("fp16", 1, True)]
    assert torch.equal(torch.get_rng_state(), drawn)
