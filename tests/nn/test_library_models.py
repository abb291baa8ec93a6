"""Models of timm and torchvision, made and trained by the ordinary trainer."""

import dataclasses
import importlib.util

import pytest
import torch
from public_models import importable
from tiny_run import here, run_tiny, tiny_data, tiny_recipe

from megabatch.app.model import build_model, make_model
from megabatch.errors import RecipeError, SettingsError
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.library_models import create_library_model
from megabatch.runtime import Runtime

NEEDS = {name: importlib.util.find_spec(name) is not None for name in ("timm", "torchvision")}


@pytest.fixture
def timm():
    if not NEEDS["timm"]:
        pytest.skip("timm is not installed")
    with importable():
        yield


@pytest.fixture
def torchvision():
    if not NEEDS["torchvision"]:
        pytest.skip("torchvision is not installed")
    with importable():
        yield


def of_library(model, **changes):
    return tiny_recipe(model=model, **changes)


def test_a_timm_net_trains_in_the_ordinary_trainer_with_span_batch_norms(tmp_path, timm):
    recipe = of_library("timm:resnet10t", total_epochs=1.0, zero_gamma=False, bn_span=24)
    model = build_model(recipe, Runtime(), world=here(), micro_batch_size=24)
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(layer, SpanBatchNorm2d) and layer.span == 24 for layer in norms)
    outcome = run_tiny(tmp_path, recipe, data=tiny_data(recipe))
    assert len(outcome["losses"]) == 5
    assert all(0 < loss < 10 for loss in outcome["losses"])


def test_library_models_have_weights_of_the_recipes_seed_and_leave_torchs_generator_alone(timm):
    recipe = of_library("timm:resnet10t")
    state = torch.get_rng_state()
    one, same = (make_model(recipe).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    other = make_model(dataclasses.replace(recipe, seed=1)).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["layer1.0.conv1.weight"], other["layer1.0.conv1.weight"])


def test_a_vision_transformer_is_made_for_the_recipes_size_and_refuses_two(timm):
    arguments = {"num_classes": 4, "in_channels": 3}
    model = create_library_model("timm", "vit_tiny_patch16_224", image_sizes=(48, 48), **arguments)
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 4)
    with pytest.raises(SettingsError, match=r"--set resolution=64 --set eval_resolution=64 works"):
        create_library_model("timm", "vit_tiny_patch16_224", image_sizes=(48, 64), **arguments)


def test_an_unknown_timm_name_is_answered_with_a_near_one(timm):
    with pytest.raises(SettingsError, match=r"no such classifier; did you mean timm:resnet5\w+\?"):
        create_library_model("timm", "resnett50", num_classes=4, in_channels=3, image_sizes=(32,))


def test_a_torchvision_net_is_made_and_grey_images_are_refused(torchvision):
    made = create_library_model("torchvision", "resnet18", num_classes=4, in_channels=3, image_sizes=(32,))
    assert made(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    with pytest.raises(SettingsError, match="3 channels, not 1"):
        create_library_model("torchvision", "resnet18", num_classes=4, in_channels=1, image_sizes=(32,))
    with pytest.raises(SettingsError, match="no such classifier"):
        create_library_model("torchvision", "inception_v3", num_classes=4, in_channels=3, image_sizes=(32,))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_cannot_be_imported_is_named(library, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(SettingsError, match=f"needs {library}, whose import failed"):
        create_library_model(library, "resnet18", num_classes=4, in_channels=3, image_sizes=(32,))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("resnet51", "model=resnet50 works"),
        ("timm:", "timm:NAME"),
        ("jax:resnet50", "torchvision:NAME"),
        ("nets/net.py:make", "--model nets/net.py:make works"),
    ],
)
def test_an_invalid_model_is_refused_by_its_name_alone(model, said):
    with pytest.raises(RecipeError) as raised:
        tiny_recipe(model=model)
    assert said in str(raised.value)
