"""Batch norm of one span that several ranks share, as an autograd function."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megabatch.nn.batch_norm.own_spans import Normalised, num_values

# torch 2.13 renamed this function and warns about the older name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]  # collectives: the only graph break of a span layer
def normalise_shared_span(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    like: Tensor,
    eps: float,
    group: dist.ProcessGroup | None,
) -> Normalised:
    """Normalises the local samples of one span whose samples are distributed over the ranks of `group`.

    A rank may have no sample. Statistics have the dtype of `like`, a tensor of C values. Every rank combines the same
    gathered values in the same order, so all ranks get the same bits:

        n = sum n_r,  m = sum n_r m_r / n,  M2 = sum M2_r + sum n_r (m_r - m)^2,  v = M2 / n

    (Chan, Golub and LeVeque 1979), with n_r values per channel, mean m_r and sum of squared differences M2_r on rank r.
    In exact arithmetic this equals E[x^2] - m^2 of Ying et al. 2018, arXiv:1811.06992. In float32 it stays accurate if
    the mean is a thousand standard deviations from 0, where E[x^2] - m^2 does not.
    Backward, with sums over the whole span and h = (x - m) / sqrt(v + eps):

        dx = weight / sqrt(v + eps) * (dy - sum(dy) / n - h * sum(dy * h) / n)

    Sends one all-gather of 2C + 1 values forward and one all-reduce of 2C values backward.
    """
    output, statistics, count = _SharedSpanNorm.apply(input, weight, bias, like, eps, group)  # type: ignore[no-untyped-call]
    return Normalised(output, [statistics], count[None])


class _SharedSpanNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        like: Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, squares, count = _combine(_gather(_local_moments(input, like), group))
        variance = squares / count.clamp(min=1)
        ctx.save_for_backward(input, weight, mean, variance, count)
        ctx.eps, ctx.group = eps, group
        statistics = torch.cat([mean, squares / (count - 1).clamp(min=1), count[None].clamp(max=1)])
        ctx.mark_non_differentiable(statistics, count)
        return _normalise(input, weight, bias, mean, variance, eps), statistics, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, variance, count = ctx.saved_tensors
        bias_grad, weight_grad = _local_gradients(grad, input, mean, variance, ctx.eps)
        input_grad = None
        if ctx.needs_input_grad[0]:  # equal on all ranks, as the collective needs: the model decides it
            sums = torch.stack([bias_grad, weight_grad])
            dist.all_reduce(sums, group=ctx.group)
            # dx = scale dy + (slope h + shift): the part in brackets is a batch norm of x with other affine parameters
            scale = torch.rsqrt(variance + ctx.eps) * (1 if weight is None else weight)
            shift, slope = -sums * scale / count.clamp(min=1)
            input_grad = _normalise(input, slope, shift, mean, variance, ctx.eps)
            input_grad.addcmul_(grad, _by_channel(scale, grad).to(grad.dtype))
        if weight is None:
            return input_grad, None, None, None, None, None
        return input_grad, weight_grad.to(weight.dtype), bias_grad.to(weight.dtype), None, None, None


def _local_moments(input: Tensor, like: Tensor) -> Tensor:
    """Mean, sum of squared differences from it, and count, as one vector of 2C + 1 values; zeros without samples."""
    channels = input.shape[1]
    moments = like.new_zeros(2 * channels + 1)
    if len(input):
        mean, scratch = moments[:channels], like.new_zeros(channels)
        variance = torch.batch_norm_update_stats(input.detach(), mean, scratch, 1.0)[1]  # momentum 1 writes into mean
        moments[channels : 2 * channels] = variance * num_values(input)
        moments[-1] = num_values(input)
    return moments


def _gather(moments: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Moments of all ranks, (ranks, 2C + 1)."""
    gathered = moments.new_empty(dist.get_world_size(group), len(moments))
    _all_gather(gathered.view(-1), moments, group=group)
    return gathered


def _combine(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sum of squared differences from it, and count over all ranks."""
    channels = moments.shape[1] // 2
    means, squares, counts = torch.split(moments, [channels, channels, 1], dim=1)
    count = counts.sum()
    mean = (means * (counts / count.clamp(min=1))).sum(0)
    return mean, (squares + counts * (means - mean).square()).sum(0), count


def _normalise(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    if not len(input):
        return torch.empty_like(input)
    output: Tensor = torch.native_batch_norm(input, weight, bias, mean, variance, False, 0.0, eps)[0]
    return output


def _local_gradients(grad: Tensor, input: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Sums over the local samples of dy and of dy * h, C values each."""
    if not len(input):
        return torch.zeros_like(mean), torch.zeros_like(mean)
    if input.is_cuda and input.element_size() == 2 and input.dim() == 4:
        # The kernel for other formats rounds these sums to 16 bit (torch 2.11). Copies only if not channels_last.
        grad, input = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (grad, input))
    saved = (mean, variance, mean, torch.rsqrt(variance + eps))  # the CPU reads the first pair, CUDA the second
    _, weight_grad, bias_grad = torch.ops.aten.native_batch_norm_backward(
        grad, input, torch.ones_like(mean), *saved, False, eps, [False, True, True]
    )
    return bias_grad, weight_grad


def _by_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))
