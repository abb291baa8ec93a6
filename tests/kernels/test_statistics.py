"""Statistics kept by the launch that computes them, or by one of their own, against what their docstrings say."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megabatch.kernels.bottleneck.conv1x1 import Tiling, conv1x1_forward
from megabatch.kernels.norm import passes as norm_passes
from megabatch.kernels.norm.passes import moments
from megabatch.kernels.statistics import RunningAverages, SpanSums, keep_statistics

pytestmark = pytest.mark.usefixtures("interpreter")

CASES = [(1, 8), (3, 20), (2, 300)]
"""Spans and channels."""
WAYS = ["by themselves", "as moments are measured", "as a convolution writes"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each span is of several parts."""
    monkeypatch.setattr(norm_passes, "TILE", 512)


def keep_by(way: str, spans: int, channels: int, seed: int, sink: Any, *, triton: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance of one forward, which are kept."""
    generator = torch.Generator().manual_seed(seed)
    if way == "by themselves":
        mean, var = torch.randn(2, spans, channels, generator=generator)
        keep_statistics(sink, mean, var.abs(), triton=triton)
        return mean, var.abs()
    x = torch.randn(2 * spans, channels, 3, 3, generator=generator) + 1
    if way == "as moments are measured":
        found = moments(x, span=2, eps=1e-5, triton=triton, sink=sink)
    else:
        weight = torch.eye(channels, dtype=x.dtype)
        backend: Any = "triton" if triton else "reference"
        tiling = Tiling(32, 16, 16, 4, 3)
        found = conv1x1_forward(x, weight, span=2, sink=sink, tiling=tiling, backend=backend)[1]
    return found.mean, found.var


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("spans", "channels"), CASES)
def test_spans_add_up_and_the_first_of_the_step_is_kept(spans: int, channels: int, way: str, triton: bool) -> None:
    sink = SpanSums(*torch.zeros(2, 2 * channels + 1).unbind())
    forwards = [keep_by(way, spans, channels, seed, sink, triton=triton) for seed in range(3)]
    rows = torch.cat([torch.cat(pair, dim=1) for pair in forwards]).double()
    torch.testing.assert_close(sink.first, torch.cat([rows[0], torch.ones(1)]).float())
    torch.testing.assert_close(sink.total[:-1], rows.sum(0).float())
    assert sink.total[-1] == 3 * spans


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("spans", "channels"), CASES)
def test_averages_move_by_momentum_towards_the_mean_over_spans(
    spans: int, channels: int, way: str, triton: bool
) -> None:
    sink = RunningAverages(torch.linspace(-1, 1, channels), torch.linspace(0, 2, channels), torch.tensor(4), 0.3)
    expected = torch.stack([sink.mean, sink.var]).double()
    for seed in range(2):
        mean, var = keep_by(way, spans, channels, seed, sink, triton=triton)
        expected = 0.7 * expected + 0.3 * torch.stack([mean.double().mean(0), var.double().mean(0)])
    torch.testing.assert_close(torch.stack([sink.mean, sink.var]).double(), expected, rtol=1e-5, atol=1e-6)
    assert sink.num_forwards == 6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spans", [1, 2])
def test_ways_to_keep_the_same_statistics_give_equal_bits(spans: int, way: str) -> None:
    at_once, after = (SpanSums(*torch.zeros(2, 33).unbind()) for _ in range(2))
    for seed in range(2):
        mean, var = keep_by(way, spans, 16, seed, at_once, triton=True)
        keep_statistics(after, mean, var, triton=True)
    assert torch.equal(at_once.first, after.first)
    assert torch.equal(at_once.total, after.total)


def test_a_channel_that_is_constant_in_the_first_span_is_not_taken_for_an_empty_one() -> None:
    sink = SpanSums(*torch.zeros(2, 17).unbind())
    for mean in (0.0, 5.0):
        keep_statistics(sink, torch.full((1, 8), mean), torch.full((1, 8), mean), triton=True)
    assert torch.equal(sink.first, torch.cat([torch.zeros(16), torch.ones(1)]))
    assert torch.equal(sink.total, torch.cat([torch.full((16,), 5.0), torch.full((1,), 2.0)]))


def test_statistics_that_a_kernel_cannot_keep_are_kept_by_torch() -> None:
    wide = torch.zeros(2, 16, 2)
    sink = RunningAverages(wide[0, :, 0], wide[1, :, 1], torch.tensor(0), 0.5)  # strided
    mean, var = keep_by("as moments are measured", 1, 16, 0, sink, triton=True)
    torch.testing.assert_close(sink.mean, 0.5 * mean[0])
    torch.testing.assert_close(sink.var, 0.5 * var[0])
    assert sink.num_forwards == 1
