"""What becomes of a forward's batch-norm statistics, in one launch a layer: in a small batch, launches are the time."""

import torch
from torch import Tensor

from megabatch.kernels.dispatch import Backend, load, on_device, use_triton

WIDEST = 8192
"""Channels that one program takes; more go to torch's operations."""


@torch.no_grad()
def collect_spans(mean: Tensor, var: Tensor, first: Tensor, total: Tensor, *, backend: Backend = "auto") -> None:
    """Adds sums of means and of variances, and the number, of all spans to `total`; the first goes to an empty `first`.

    Shapes: mean and var (spans, C); first and total (2C + 1), of which the last value counts spans.
    """
    spans, columns = mean.shape
    if not _served(mean, var, first, total, backend=backend):
        rows = torch.cat([mean, var, torch.ones_like(mean[:, :1])], dim=1)
        torch.where(first[-1:] == 0, rows[0], first, out=first)
        total.add_(rows.sum(0))
        return
    with on_device(mean):
        load("_batch_norm_triton").collect_kernel[(1,)](
            mean, var, first, total, spans, columns, block=1 << (columns - 1).bit_length(), num_warps=4
        )


@torch.no_grad()
def move_averages(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_forwards: Tensor,
    *,
    momentum: float,
    backend: Backend = "auto",
) -> None:
    """running = (1 - momentum) running + momentum (mean over spans), of means and of variances; counts the forward.

    Shapes: mean and var (spans, C); running_mean and running_var (C,); num_forwards an integer, 0-d.
    """
    spans, columns = mean.shape
    if not _served(mean, var, running_mean, running_var, backend=backend):
        running_mean.lerp_(mean.mean(0), momentum)
        running_var.lerp_(var.mean(0), momentum)
        num_forwards.add_(1)
        return
    with on_device(mean):
        load("_batch_norm_triton").averages_kernel[(-(-columns // 128),)](
            mean, var, running_mean, running_var, num_forwards, spans, momentum, columns, block=128, num_warps=4
        )


def _served(*tensors: Tensor, backend: Backend) -> bool:
    """Whether the kernels take them."""
    plain = all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors)
    return use_triton(tensors[0], backend) and plain and tensors[0].shape[1] <= WIDEST
