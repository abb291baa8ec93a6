"""Convolutions whose backward corrupts memory in PyTorch on a CPU are not trained in channels_last."""

import dataclasses

import pytest
import torch
from tiny_run import tiny_recipe

from megabatch import recipes
from megabatch.app.measured.layout import measured_layout
from megabatch.app.model import unsafe_convolution
from megabatch.app.resolve import check
from megabatch.comm.launch import World
from megabatch.errors import SettingsError
from megabatch.runtime import Runtime
from megabatch.train.precision import Precision


def check_on(device: str, width: int, **runtime) -> int:
    return check(tiny_recipe(width=width), Runtime(**runtime), world_size=1, device=torch.device(device))


@pytest.mark.parametrize("width", [2, 4, 7])
def test_a_narrow_net_in_channels_last_on_a_cpu_is_refused_with_settings_that_work(width):
    with pytest.raises(SettingsError, match=r"downsample\.0.*no such option, or --set width=8, works"):
        check_on("cpu", width, channels_last=True)


def test_the_named_remedies_and_a_gpu_are_accepted():
    assert check_on("cpu", 4)
    assert check_on("cpu", 4, channels_last=False)
    assert check_on("cpu", 8, channels_last=True)
    assert check_on("cuda", 4, channels_last=True, capture="off", precision="fp32")


@pytest.mark.parametrize(("width", "channels_last"), [(4, False), (8, True)])
def test_a_narrow_net_is_trained_in_nchw_on_a_cpu(width, channels_last):
    recipe, precision = tiny_recipe(width=width), Precision("fp32", torch.device("cpu"))
    chosen = measured_layout(recipe, Runtime(), precision, world=World(), warn=pytest.fail)
    assert chosen.channels_last is channels_last


@pytest.mark.parametrize("name", sorted(recipes.names()))
def test_every_recipe_is_safe(name):
    assert unsafe_convolution(dataclasses.replace(recipes.get(name), num_classes=10)) is None
