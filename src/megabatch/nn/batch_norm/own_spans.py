"""Batch norm of a micro-batch that holds its spans alone, one span or several."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Normalised(NamedTuple):
    """What a training forward yields."""

    output: Tensor  # as the input
    statistics: list[Tensor]  # per span (2C + 1): means, unbiased variances, and 1, or 0 if a group brought no sample
    counts: Tensor | list[int]  # values per channel in each span; a tensor where only the group's sum tells


def normalise_own_spans(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, *, like: Tensor, span: int, eps: float
) -> Normalised:
    """Each `span` consecutive samples by their own statistics, and what remains by its own; statistics as `like`.

    Costs one native batch norm a span, and beyond one span a copy of the output and one of the gradient (10 to 60 %
    of a batch norm's own time on a CPU). No sample gives no span. A span with one value per channel has variance 0:
    its output is the bias.
    """
    spans = _split(input, span)
    statistics = [like.new_ones(2 * len(like) + 1) for _ in spans]
    outputs = [_normalise(x, weight, bias, row, eps) for x, row in zip(spans, statistics, strict=True)]
    return Normalised(_joined(outputs, input, weight, bias), statistics, [num_values(x) for x in spans])


def num_values(input: Tensor) -> int:
    """Values per channel."""
    return input.numel() // input.shape[1]


def _split(input: Tensor, span: int) -> tuple[Tensor, ...]:
    """Whole spans and what remains; a single span is the input itself, since a split copies in backward."""
    if len(input) <= span:
        return (input,) if len(input) else ()
    return torch.split(input, span)


def _joined(outputs: list[Tensor], input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if not outputs:
        return _affine(input, weight, bias)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _normalise(input: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, eps: float) -> Tensor:
    """One span's output; its means and unbiased variances go into `statistics` (2C + 1)."""
    channels = input.shape[1]
    mean, variance = statistics[:channels], statistics[channels:-1]
    if num_values(input) == 1:
        mean.copy_(input.detach().flatten())
        variance.zero_()
        return _affine(input - input, weight, bias)
    # With momentum 1 the "running" buffers receive exactly this span's statistics.
    return functional.batch_norm(input, mean, variance, weight, bias, training=True, momentum=1.0, eps=eps)


def _affine(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight * input + bias: what is left of batch norm where nothing can be normalised; keeps the graph whole."""
    if weight is None or bias is None:
        return input.clone()
    shape = (1, -1, *[1] * (input.dim() - 2))
    return (input * weight.view(shape) + bias.view(shape)).to(input.dtype)
