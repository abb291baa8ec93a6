"""Accumulated statistics, by the launch that computes them or by a separate one, against their definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megabatch.kernels.gram import gram_conv1x1_norm
from megabatch.kernels.norm import passes as norm_passes
from megabatch.kernels.norm.passes import moments
from megabatch.kernels.statistics import RunningAverages, SpanSums, keep_statistics

pytestmark = pytest.mark.usefixtures("interpreter")

CASES = [(1, 16), (3, 48), pytest.param(2, 300, marks=pytest.mark.slow)]
"""Spans and channels."""
METHODS = ["separate launch", "with moments", "with a convolution"]
"""How the statistics are accumulated."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that each span is divided into several parts."""
    monkeypatch.setattr(norm_passes, "TILE", 512)


def keep_by(method: str, spans: int, channels: int, seed: int, sink: Any, *, triton: bool) -> tuple[Tensor, Tensor]:
    """Accumulates the statistics of one forward into `sink`; returns their mean and variance."""
    generator = torch.Generator().manual_seed(seed)
    if method == "separate launch":
        mean, var = torch.randn(2, spans, channels, generator=generator)
        keep_statistics(sink, mean, var.abs(), triton=triton)
        return mean, var.abs()
    x = torch.randn(2 * spans, channels, 3, 3, generator=generator) + 1
    if method == "with moments":
        found = moments(x, span=2, eps=1e-5, triton=triton, sink=sink)
    else:
        weight, vector = torch.eye(channels)[:, :, None, None], torch.ones(channels)
        backend: Any = "triton" if triton else "reference"
        found = gram_conv1x1_norm(x.half(), weight, vector, vector, span=2, sink=sink, backend=backend)
    return found.mean, found.var


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("spans", "channels"), CASES)
def test_span_sums_hold_the_sum_over_spans_and_the_first_span(
    spans: int, channels: int, method: str, triton: bool
) -> None:
    sink = SpanSums(*torch.zeros(2, 2 * channels + 1).unbind())
    forwards = [keep_by(method, spans, channels, seed, sink, triton=triton) for seed in range(3)]
    rows = torch.cat([torch.cat(pair, dim=1) for pair in forwards]).double()
    torch.testing.assert_close(sink.first, torch.cat([rows[0], torch.ones(1)]).float())
    torch.testing.assert_close(sink.total[:-1], rows.sum(0).float())
    assert sink.total[-1] == 3 * spans


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("spans", "channels"), CASES)
def test_running_averages_move_towards_the_mean_over_spans_by_momentum(
    spans: int, channels: int, method: str, triton: bool
) -> None:
    sink = RunningAverages(torch.linspace(-1, 1, channels), torch.linspace(0, 2, channels), torch.tensor(4), 0.3)
    expected = torch.stack([sink.mean, sink.var]).double()
    for seed in range(2):
        mean, var = keep_by(method, spans, channels, seed, sink, triton=triton)
        expected = 0.7 * expected + 0.3 * torch.stack([mean.double().mean(0), var.double().mean(0)])
    torch.testing.assert_close(torch.stack([sink.mean, sink.var]).double(), expected, rtol=1e-5, atol=1e-6)
    assert sink.num_forwards == 6


@pytest.mark.parametrize("spans", [1, 3])
@pytest.mark.parametrize("triton", [True, False])
def test_a_short_last_span_counts_by_its_weight(spans: int, triton: bool) -> None:
    weights = torch.tensor([1.0] * (spans - 1) + [0.25])[:, None]
    mean, var = torch.randn(2, spans, 8).abs()
    sums = SpanSums(*torch.zeros(2, 17).unbind(), last_weight=0.25)
    averages = RunningAverages(torch.zeros(8), torch.zeros(8), torch.tensor(0), 1.0, last_weight=0.25)
    for sink in (sums, averages):
        keep_statistics(sink, mean, var, triton=triton)
    rows = torch.cat([mean, var, torch.ones(spans, 1)], dim=1) * weights
    torch.testing.assert_close(sums.first, rows[0])
    torch.testing.assert_close(sums.total, rows.sum(0))
    torch.testing.assert_close(torch.cat([averages.mean, averages.var]), (rows.sum(0) / weights.sum())[:-1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spans", [1, 2])
def test_all_methods_accumulate_bitwise_equal_statistics(spans: int, method: str) -> None:
    at_once, after = (SpanSums(*torch.zeros(2, 33).unbind()) for _ in range(2))
    for seed in range(2):
        mean, var = keep_by(method, spans, 16, seed, at_once, triton=True)
        keep_statistics(after, mean, var, triton=True)
    assert torch.equal(at_once.first, after.first)
    assert torch.equal(at_once.total, after.total)


@pytest.mark.parametrize("first_by_triton", [True, False])
def test_a_channel_of_variance_0_in_the_first_span_does_not_count_as_empty(first_by_triton: bool) -> None:
    sink = SpanSums(*torch.zeros(2, 17).unbind())
    for mean, triton in ((0.0, first_by_triton), (5.0, True)):
        keep_statistics(sink, torch.full((1, 8), mean), torch.full((1, 8), mean), triton=triton)
    assert torch.equal(sink.first, torch.cat([torch.zeros(16), torch.ones(1)]))
    assert torch.equal(sink.total, torch.cat([torch.full((16,), 5.0), torch.full((1,), 2.0)]))


def test_torch_accumulates_into_sinks_that_the_kernels_do_not_support() -> None:
    wide = torch.zeros(2, 16, 2)
    sink = RunningAverages(wide[0, :, 0], wide[1, :, 1], torch.tensor(0), 0.5)  # strided
    mean, var = keep_by("with moments", 1, 16, 0, sink, triton=True)
    torch.testing.assert_close(sink.mean, 0.5 * mean[0])
    torch.testing.assert_close(sink.var, 0.5 * var[0])
    assert sink.num_forwards == 1
