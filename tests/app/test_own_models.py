"""`--model FILE.py:FUNCTION`: the user's file runs if the user names it, and never because a checkpoint does."""

import pytest
import torch
from command_line import error_line, megabatch
from tiny_run import run_tiny, tiny_recipe

from megabatch import load_model
from megabatch.errors import SettingsError
from megabatch.runtime import Runtime

NET = """
from torch import nn

def make(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, num_classes),
    )

def wide(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes + 1))

def text(num_classes, in_channels):
    return "a model"
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    return tmp_path / "net.py"


def own(net, name="make"):
    return Runtime(precision="fp32", micro_batch_size=8, model=f"{net}:{name}")


def test_a_users_function_trains_and_loads_only_where_it_is_named_again(net, tmp_path):
    recipe = tiny_recipe(model="net.py:make")
    trained = run_tiny(tmp_path / "run", recipe, runtime=own(net))
    loaded = load_model(tmp_path / "run", model=f"{net}:make").state_dict()
    assert all(torch.equal(loaded[name], trained["weights"][name]) for name in loaded)
    net.write_text("raise AssertionError('a checkpoint ran a file')")
    with pytest.raises(SettingsError, match=r"runs a file only if you name it; --model PATH/net.py:make works"):
        load_model(tmp_path / "run")


def test_a_run_resumes_with_the_same_function(net, tmp_path):
    recipe = tiny_recipe(model="net.py:make", total_epochs=1.0)
    whole = run_tiny(tmp_path / "whole", recipe, runtime=own(net))
    run_tiny(tmp_path / "parts", recipe, runtime=own(net), stop_at=2)
    resumed = Runtime(precision="fp32", micro_batch_size=8, model=f"{net}:make", resume=True)
    parts = run_tiny(tmp_path / "parts", recipe, runtime=resumed)
    assert all(torch.equal(parts["weights"][name], whole["weights"][name]) for name in whole["weights"])


def test_another_model_than_the_checkpoints_is_refused(net, tmp_path):
    run_tiny(tmp_path / "run", tiny_recipe(total_epochs=0.5, warmup_epochs=0.1))
    with pytest.raises(SettingsError, match="the checkpoint's model is resnet8; omit --model"):
        load_model(tmp_path / "run", model=f"{net}:make")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nothing", "has no function nothing, only make, wide, text"),
        ("text", "returned str, needed: a torch.nn.Module"),
        ("wide", r"it computed \(2, 5\), needed: logits \(2, 4\)"),
    ],
)
def test_a_function_that_makes_no_classifier_is_refused(net, tmp_path, function, said):
    with pytest.raises(SettingsError, match=said):
        run_tiny(tmp_path / "run", tiny_recipe(model=f"net.py:{function}"), runtime=own(net, function))


@pytest.mark.parametrize(
    ("text", "said"), [("1 / 0", "raised ZeroDivisionError"), (None, "there is no file"), ("x = 1", "only none")]
)
def test_a_file_that_cannot_be_used_is_one_line(net, tmp_path, text, said):
    net.unlink()
    if text is not None:
        net.write_text(text)
    arguments = ("train", "fashion_mnist", "--model", f"{net}:make", "--steps", 1, "--workers", 1)
    assert said in error_line(megabatch(*arguments, "--output", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_same_setting_given_twice_is_refused():
    said = error_line(megabatch("train", "fashion_mnist", "--model", "resnet18", "--set", "model=resnet8"))
    assert "--model resnet18 alone works" in said
