"""Gradients of a fused ResNet-50 are as close to float64 as those of plain autocast."""

import contextlib
import copy
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.fused.fuse import set_fusion
from megabatch.nn.initialize import last_norms
from megabatch.nn.loss import cross_entropy_sum
from megabatch.nn.resnet import resnet50

COUNT, PIXELS, SPAN = 6, 64, 4
SLACK = 1.1


class Result(NamedTuple):
    """Gradients and running averages after one step."""

    gradients: dict[str, Tensor]
    averages: dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def plain_model() -> nn.Module:
    """Branches start small but not at 0: all get gradients, and rounding does not grow tenfold per stage."""
    torch.manual_seed(0)
    model = resnet50(num_classes=10, norm=lambda channels: SpanBatchNorm2d(channels, span=SPAN))
    for norm in last_norms(model):
        nn.init.constant_(norm.weight, 0.2)
    return model.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def exact(plain_model: nn.Module) -> Result:
    return step(copy.deepcopy(plain_model).double(), torch.float64)


def step(model: nn.Module, dtype: torch.dtype) -> Result:
    """The gradient of the mean loss, in float64; autocast in 16 bit."""
    images = torch.randn(COUNT, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(1))
    images = images.to(torch.float64 if dtype == torch.float64 else torch.float32, memory_format=torch.channels_last)
    half = dtype.itemsize == 2
    with torch.autocast("cpu", dtype=dtype) if half else contextlib.nullcontext():
        logits = model(images)
    (cross_entropy_sum(logits, torch.arange(COUNT), label_smoothing=0.1) / COUNT).backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == 161
    return Result(gradients, {name: b.double() for name, b in model.named_buffers() if "running" in name})


def error(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).norm() / reference.norm())


def errors(found: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, float]:
    """Relative errors of all tensors as one vector, and of the median tensor."""
    each = sorted(error(found[name], reference[name]) for name in reference)
    together, exact = (torch.cat([t.flatten() for t in d.values()]) for d in (found, reference))
    return error(together, exact), each[len(each) // 2]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_and_averages_are_as_close_to_float64_as_the_plain_models(
    dtype: torch.dtype, plain_model: nn.Module, exact: Result
) -> None:
    fused_model = copy.deepcopy(plain_model)
    set_fusion(fused_model, "reference")
    plain, fused = step(copy.deepcopy(plain_model), dtype), step(fused_model, dtype)
    for number, reference in enumerate(exact):
        for mine, torchs in zip(errors(fused[number], reference), errors(plain[number], reference), strict=True):
            assert mine <= SLACK * torchs + 1e-6
            assert torchs < 0.6  # else the comparison is of noise
    first = error(fused.averages["bn1.running_mean"], plain.averages["bn1.running_mean"])
    assert first < 2.0**-8  # the first norm's input has been rounded once only


@pytest.mark.slow
def test_equal_steps_give_equal_bits(plain_model: nn.Module) -> None:
    results = []
    for _ in range(2):
        model = copy.deepcopy(plain_model)
        set_fusion(model, "reference")
        results.append(step(model, torch.bfloat16))
    for name, gradient in results[0].gradients.items():
        assert torch.equal(gradient, results[1].gradients[name])
