"""Accumulation of batch-norm statistics into span sums or running averages.

With a single span, the launch that computes the statistics also accumulates them: at small batches launch overhead
dominates, and one more launch per layer adds about 8 %. With several spans a second launch reduces over the spans.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megabatch.kernels.dispatch import load, on_device


class SpanSums(NamedTuple):
    """Statistics summed over the forwards of a step. Both vectors are (2C + 1): C means, C variances, a span count.

    `total` is the sum over all spans. `first` holds the first span seen since it was zeroed. In both, the last span of
    the forward, and its count of 1, are multiplied by `last_weight`: its size relative to a whole span.

    The kernels test for each channel separately whether `first` is empty, because a program that read the shared count
    could see it after another program had changed it. A channel is empty if all bits of its variance are 0; a variance
    of 0 is therefore stored as -0.
    """

    first: Tensor
    total: Tensor
    last_weight: float = 1.0


class RunningAverages(NamedTuple):
    """running = (1 - momentum) running + momentum (mean over spans), for mean and var (C,).

    The last span has the weight `last_weight` in the mean, the others 1. num_forwards, a 0-d integer tensor, is
    incremented once per forward.
    """

    mean: Tensor
    var: Tensor
    num_forwards: Tensor
    momentum: float
    last_weight: float = 1.0


StatisticsSink = SpanSums | RunningAverages
"""Destination of the statistics of a forward."""


@torch.no_grad()
def keep_statistics(sink: StatisticsSink, mean: Tensor, var: Tensor, *, triton: bool) -> None:
    """Accumulates mean and unbiased variance of a forward's spans, each (spans, C), into `sink`."""
    if not (triton and has_kernel(sink)):
        _keep_reference(sink, mean, var)
        return
    spans, columns = mean.shape
    # One program per 128 channels: each sums its channels over all spans, so no two programs write one value.
    with on_device(mean):
        load("kernels._statistics_triton").keep_kernel[(-(-columns // 128),)](
            mean, var, spans, columns, **kernel_arguments(sink), block=128, num_warps=4
        )


def has_kernel(sink: StatisticsSink) -> bool:
    """True if the kernels can write to `sink`: contiguous float32 vectors, and only whole spans."""
    vectors = sink[:2]
    return sink.last_weight == 1 and all(values.is_contiguous() and values.dtype == torch.float32 for values in vectors)


def kernel_arguments(sink: StatisticsSink) -> dict[str, Any]:
    """Keyword arguments that describe `sink` to a kernel."""
    if isinstance(sink, SpanSums):
        return {
            "sink_a": sink.first,
            "sink_b": sink.total,
            "sink_count": sink.total,
            "momentum": 0.0,
            "sink_kind": "sums",
        }
    return {
        "sink_a": sink.mean,
        "sink_b": sink.var,
        "sink_count": sink.num_forwards,
        "momentum": sink.momentum,
        "sink_kind": "averages",
    }


def no_arguments(unused: Tensor) -> dict[str, Any]:
    """Keyword arguments for a kernel that accumulates nothing; `unused` stands in for the pointers."""
    return {"sink_a": unused, "sink_b": unused, "sink_count": unused, "momentum": 0.0, "sink_kind": "none"}


def _keep_reference(sink: StatisticsSink, mean: Tensor, var: Tensor) -> None:
    if isinstance(sink, SpanSums):
        # One row of `total` and `first` per span: mean, variance (-0 for 0, as the kernels store it), and 1.
        rows = torch.cat([mean, torch.where(var == 0, -0.0, var), torch.ones_like(mean[:, :1])], dim=1)
        rows[-1] *= sink.last_weight
        # Unlike in a kernel, one operation writes all channels, so the count alone tells if `first` is empty.
        torch.where(sink.first[-1:] == 0, rows[0], sink.first, out=sink.first)
        sink.total.add_(rows.sum(0))
        return
    sink.mean.lerp_(_mean_over_spans(mean, sink.last_weight), sink.momentum)
    sink.var.lerp_(_mean_over_spans(var, sink.last_weight), sink.momentum)
    sink.num_forwards.add_(1)


def _mean_over_spans(values: Tensor, last_weight: float) -> Tensor:
    if last_weight == 1:
        return values.mean(0)
    return (values[:-1].sum(0) + last_weight * values[-1]) / (len(values) - 1 + last_weight)
