"""What becomes of a forward's batch-norm statistics: the launch that computes them keeps them too, if it has one span.

In a small batch launches are the time, and a launch more a layer would be one in twelve. Several spans are put together
by a launch of their own, after those that work on one span each.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megabatch.kernels.dispatch import load, on_device


class SpanSums(NamedTuple):
    """Of a step's forwards: `total` has the sums of means and of variances and the number of all spans, `first` a span.

    Both (2C + 1). `first` keeps the first span since it was all 0, with 1 behind. The kernels look at each channel for
    itself, as no program could look at the number behind before another changed it: a channel whose variance has no
    bit set is empty, and a variance of 0 is kept as -0.
    """

    first: Tensor
    total: Tensor


class RunningAverages(NamedTuple):
    """running = (1 - momentum) running + momentum (mean over spans), both (C,); num_forwards, an integer, counts."""

    mean: Tensor
    var: Tensor
    num_forwards: Tensor
    momentum: float


StatisticsSink = SpanSums | RunningAverages
"""Where statistics go."""


@torch.no_grad()
def keep_statistics(sink: StatisticsSink, mean: Tensor, var: Tensor, *, triton: bool) -> None:
    """Keeps those of a forward's spans, (spans, C) each; `var` is the unbiased variance."""
    if not (triton and has_kernel(sink)):
        _keep_reference(sink, mean, var)
        return
    spans, columns = mean.shape
    with on_device(mean):
        load("kernels._statistics_triton").keep_kernel[(-(-columns // 128),)](
            mean, var, spans, columns, **kernel_arguments(sink), block=128, num_warps=4
        )


def has_kernel(sink: StatisticsSink) -> bool:
    """Whether kernels can keep statistics there: vectors as they walk them, in float32."""
    vectors = sink[:2]
    return all(values.is_contiguous() and values.dtype == torch.float32 for values in vectors)


def kernel_arguments(sink: StatisticsSink) -> dict[str, Any]:
    """What a kernel is told of it, by the names of its parameters."""
    if isinstance(sink, SpanSums):
        return {"one": sink.first, "two": sink.total, "count": sink.total, "momentum": 0.0, "keep": "sums"}
    return {
        "one": sink.mean,
        "two": sink.var,
        "count": sink.num_forwards,
        "momentum": sink.momentum,
        "keep": "averages",
    }


def no_arguments(unused: Tensor) -> dict[str, Any]:
    """Of a kernel that keeps nothing."""
    return {"one": unused, "two": unused, "count": unused, "momentum": 0.0, "keep": "nothing"}


def _keep_reference(sink: StatisticsSink, mean: Tensor, var: Tensor) -> None:
    if isinstance(sink, SpanSums):
        rows = torch.cat([mean, var, torch.ones_like(mean[:, :1])], dim=1)
        torch.where(sink.first[-1:] == 0, rows[0], sink.first, out=sink.first)
        sink.total.add_(rows.sum(0))
        return
    sink.mean.lerp_(mean.mean(0), sink.momentum)
    sink.var.lerp_(var.mean(0), sink.momentum)
    sink.num_forwards.add_(1)
