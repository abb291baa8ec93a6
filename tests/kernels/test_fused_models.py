"""Whole networks with fused kernels, interpreted: their gradients are as close to float64 as those of plain ones."""

import copy
import functools
from typing import Any

import pytest
import torch
from norm_cases import step_sums
from torch import Tensor, nn

from megabatch.kernels.norm import passes as norm_passes
from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.fused import gram
from megabatch.nn.fused.fuse import set_fusion
from megabatch.nn.initialize import last_norms
from megabatch.nn.loss import cross_entropy_sum
from megabatch.nn.resnet import Bottleneck, ResNet, convolution, stage
from megabatch.nn.small import resnet8

pytestmark = pytest.mark.usefixtures("interpreter")

COUNT, SPAN = 5, 2
SLACK = 1.5  # mean over two networks: which ReLUs flip by rounding is random


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_passes, "TILE", 1024)
    monkeypatch.setattr(gram, "ROWS_PER_CHANNEL", 0)


def thin_bottlenecks(norm: Any) -> nn.Module:
    """A ResNet with the full stem and three bottlenecks of 16 and 64 channels."""
    model = ResNet(Bottleneck, (1, 1, 1, 1), num_classes=10, norm=norm)
    make = functools.partial(Bottleneck, norm=norm)
    model.conv1, model.bn1 = convolution(3, 16, 7, 2), norm(16)
    model.layer1 = stage(make, 16, 16, 2, stride=1, expansion=4)
    model.layer2 = stage(make, 64, 16, 1, stride=2, expansion=4)
    model.layer3, model.layer4, model.fc = nn.Sequential(), nn.Sequential(), nn.Linear(64, 10)
    return model


def build(make: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = make(norm=functools.partial(SpanBatchNorm2d, span=SPAN))
    for norm in last_norms(model):
        nn.init.constant_(norm.weight, 0.5)
    collect_statistics(model)
    return model


def step(model: nn.Module, pixels: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the gradients of 64 times the mean loss, and the collected statistics; 16-bit dtypes through autocast."""
    images = torch.randn(COUNT, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast("cpu", dtype=dtype, enabled=dtype.itemsize == 2):
        logits = model(images.to(wide))
    (64 * cross_entropy_sum(logits, torch.arange(COUNT)) / COUNT).backward()
    sums = {name: values.double() for name, values in step_sums(model).items()}
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}, sums


def error(found: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    assert found.keys() == reference.keys()
    one, other = (torch.cat([t.flatten() for t in tensors.values()]) for tensors in (found, reference))
    return float((one - other).norm() / other.norm())


def mean_errors(make: Any, pixels: int, dtype: torch.dtype, seeds: tuple[int, ...]) -> list[tuple[float, float]]:
    """Errors (fused, plain) of the gradients, then of the statistics, averaged over networks with different seeds.

    In a single network, one ReLU that flips by rounding can dominate the error.
    """
    pairs = []
    for seed in seeds:
        plain = build(make, seed)
        exact, fused = copy.deepcopy(plain).double(), copy.deepcopy(plain)
        set_fusion(fused, "triton")
        right = step(exact, pixels, torch.float64)
        found = step(fused, pixels, dtype), step(plain, pixels, dtype)
        pairs.append([error(result[what], right[what]) for what in (0, 1) for result in found])
    means = [sum(values) / len(values) for values in zip(*pairs, strict=True)]
    return [(means[0], means[1]), (means[2], means[3])]


@pytest.mark.slow
def test_bottlenecks_of_kernels_are_as_close_to_float64_as_plain_ones() -> None:
    for fused, plain in mean_errors(thin_bottlenecks, 24, torch.float16, seeds=(1, 2)):
        assert plain < 0.2  # otherwise the comparison would mean nothing
        assert fused < SLACK * plain


@pytest.mark.parametrize(
    ("make", "pixels"),
    [pytest.param(thin_bottlenecks, 16, marks=pytest.mark.slow), (functools.partial(resnet8, width=8), 16)],
    ids=["bottlenecks", "basic"],
)
def test_fused_networks_in_float32_have_the_gradients_and_statistics_of_float64(make: Any, pixels: int) -> None:
    for fused, plain in mean_errors(make, pixels, torch.float32, seeds=(0,)):
        assert fused < 1e-4
        assert plain < 1e-4
