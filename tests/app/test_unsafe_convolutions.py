"""Convolutions whose backward corrupts memory in PyTorch on a CPU are refused before training."""

import dataclasses

import pytest
import torch
from tiny_run import tiny_recipe

from megabatch import recipes
from megabatch.app.model import refuse_unsafe_convolutions
from megabatch.app.resolve import check
from megabatch.errors import SettingsError
from megabatch.runtime import Runtime


def check_on(device: str, width: int, **runtime) -> int:
    return check(tiny_recipe(width=width), Runtime(**runtime), world_size=1, device=torch.device(device))


@pytest.mark.parametrize("width", [2, 4, 7])
def test_a_narrow_net_in_channels_last_on_a_cpu_is_refused_with_settings_that_work(width):
    with pytest.raises(SettingsError, match=r"downsample\.0.*--no-channels-last or --set width=8 works"):
        check_on("cpu", width)


def test_the_named_remedies_and_a_gpu_are_accepted():
    assert check_on("cpu", 4, channels_last=False)
    assert check_on("cpu", 8)
    assert check_on("cuda", 4, capture="off", precision="fp32")


@pytest.mark.parametrize("name", sorted(recipes.names()))
def test_every_recipe_is_safe(name):
    refuse_unsafe_convolutions(dataclasses.replace(recipes.get(name), num_classes=10))
