"""`--init-from`: weights of runs, torch files and safetensors; a last layer of other classes is new."""

import dataclasses
import pickle

import pytest
import torch
from tiny_run import here, run_tiny, tiny_data, tiny_recipe

from megabatch import create_model
from megabatch.app.initial_weights import match_weights, read_weights, weights_digest
from megabatch.app.model import build_model
from megabatch.app.state import refuse_other_recipe
from megabatch.errors import CheckpointError
from megabatch.files import sha256_of
from megabatch.runtime import Runtime


def net(num_classes=4, seed=0, **changes):
    torch.manual_seed(seed)
    return create_model("resnet8", **{"num_classes": num_classes, "in_channels": 1, "width": 8} | changes)


@pytest.fixture
def weights():
    return net(num_classes=7).state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": {f"module.{name}": tensor for name, tensor in weights.items()}},
        lambda weights: {"state_dict": {f"model._orig_mod.{name}": tensor for name, tensor in weights.items()}},
    ],
    ids=["plain", "timm", "torchvision", "lightning"],
)
def test_state_dicts_are_found_inside_other_scripts_checkpoints(tmp_path, weights, wrap):
    torch.save(wrap(weights), tmp_path / "weights.pth")
    assert same(read_weights(tmp_path / "weights.pth"), dict(weights))


def test_safetensors_are_read(tmp_path, weights):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "weights.safetensors")
    assert same(read_weights(tmp_path / "weights.safetensors"), dict(weights))
    (tmp_path / "weights.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_weights(tmp_path / "weights.safetensors")


def test_a_run_starts_from_another_run_with_a_new_last_layer(tmp_path):
    recipe = tiny_recipe(total_epochs=0.5, warmup_epochs=0.1)
    before = run_tiny(tmp_path / "before", recipe)["weights"]
    initial = read_weights(tmp_path / "before")
    other = dataclasses.replace(recipe, num_classes=6)
    model = build_model(other, Runtime(), world=here(), micro_batch_size=8, initial=initial)
    plain = build_model(other, Runtime(), world=here(), micro_batch_size=8)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (plain.state_dict() if name.startswith("fc.") else before)[name])


def test_a_run_from_given_weights_names_what_was_loaded(tmp_path):
    recipe = tiny_recipe(total_epochs=0.5, warmup_epochs=0.1)
    torch.save(net(num_classes=7).state_dict(), tmp_path / "weights.pth")
    runtime = Runtime(precision="fp32", micro_batch_size=8, init_from=tmp_path / "weights.pth")
    run_tiny(tmp_path / "run", recipe, runtime=runtime, data=tiny_data(recipe))
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "initial weights: 54 tensors loaded, the last layer is new (fc.weight [4, 32], in the file [7, 32]" in events


def test_the_last_layer_of_a_run_with_other_class_names_is_not_taken(tmp_path):
    run_tiny(tmp_path, tiny_recipe(total_epochs=0.5, warmup_epochs=0.1))
    assert "fc.weight" in read_weights(tmp_path)
    assert "fc.weight" in read_weights(tmp_path, ("a", "b", "c", "d"))
    others = read_weights(tmp_path, ("cat", "dog", "cow", "hen"))
    assert set(read_weights(tmp_path)) - set(others) == {"fc.weight", "fc.bias"}


def test_the_average_of_a_run_is_taken_where_it_has_one(tmp_path):
    recipe = tiny_recipe(total_epochs=0.5, warmup_epochs=0.1, ema_half_life_epochs=0.2)
    live = run_tiny(tmp_path, recipe)["weights"]
    averaged = read_weights(tmp_path)
    assert averaged.keys() >= live.keys() - {name for name in live if name.endswith("span_sum")}
    assert not torch.equal(averaged["conv1.weight"], live["conv1.weight"])


def test_files_without_counters_of_batches_load(weights):
    old = {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    assert not match_weights(net(num_classes=7), old).new


@pytest.mark.parametrize(("changes", "said"), [({"width": 16}, "conv1.weight"), ({"in_channels": 3}, "conv1.weight")])
def test_weights_of_another_backbone_are_refused_with_both_shapes(weights, changes, said):
    with pytest.raises(CheckpointError, match=rf"do not fit the model: {said} \[\d+, \d, 3, 3\], in the file \[8, 1"):
        match_weights(net(**changes), weights)


def test_tensors_that_the_model_has_no_place_for_are_counted(weights):
    matched = match_weights(net(num_classes=7), weights | {"aux.weight": torch.zeros(1)})
    assert str(matched) == "56 tensors loaded, the last layer too, 1 not used (aux.weight)"


def test_damaged_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_weights(path)
    for content in (b"", b"not a file of torch", pickle.dumps(print, protocol=2)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="could not be read as plain tensors"):
            read_weights(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        read_weights(path)


def test_the_recipe_records_the_file_by_its_digest(tmp_path, weights):
    torch.save(weights, tmp_path / "weights.pth")
    digest = weights_digest(tmp_path / "weights.pth")
    assert digest == sha256_of(tmp_path / "weights.pth")[:16]
    with pytest.raises(CheckpointError, match=f"initial_weights was {digest}, now ;"):
        refuse_other_recipe(tiny_recipe(), tiny_recipe(initial_weights=digest))
