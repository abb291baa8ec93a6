"""A 1x1 convolution with the batch norm, residual sum and ReLU behind it, by `megabatch.kernels.gram`."""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from megabatch.kernels.bottleneck.fold import Group
from megabatch.kernels.dispatch import Backend
from megabatch.kernels.gram import gram_conv1x1_norm
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.batch_norm.own_spans import Normalised
from megabatch.nn.fused.convolution import compute_type, convolve
from megabatch.nn.fused.norm_act import TYPES, is_fusable, is_hooked, norm_act, sink_of, span_of, supports

ROWS_PER_CHANNEL = 8
"""Fewest rows of a span per channel of its convolution's input. With 8, the float32 products that a span takes whatever
its size are a quarter of the convolution's forward."""


def conv_norm_act(
    conv: nn.Module,
    norm: nn.Module,
    x: Tensor,
    *,
    backend: Backend,
    residual: Tensor | None = None,
    relu: bool = True,
    following: nn.Module | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Returns z = relu(norm(conv(x)) + residual), by statistics of x where the GPU's kernels and the layers allow it.

    Then also the output of `following`, a convolution of z, if it is a product too, else None. Running statistics are
    updated as by norm(conv(x)), also those of spans that several ranks share.
    """
    if not (supports(x, backend) and _supports(conv, norm, x, residual)):
        return norm_act(norm, convolve(conv, x, backend), backend=backend, residual=residual, relu=relu), None
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    images = x.to(compute_type(conv.weight))
    is_product = following is not None and is_pointwise(following) and following.stride == (1, 1)
    output = gram_conv1x1_norm(
        images,
        conv.weight,
        norm.weight,
        norm.bias,
        span=span_of(norm, images),
        eps=norm.eps,
        residual=residual,
        relu=relu,
        stride=(conv.stride[0], conv.stride[1]),
        next_weight=following.weight if is_product and isinstance(following, nn.Conv2d) else None,
        group=Group(norm.process_group) if _is_shared(norm) else None,
        sink=None if _is_shared(norm) else sink_of(norm, images),
        backend=backend,
    )
    if _is_shared(norm):
        assert output.num_rows is not None
        statistics = torch.cat([output.mean, output.var, output.num_rows.clamp(max=1)], dim=1)
        norm.keep_spans(images, Normalised(output.z, list(statistics), output.num_rows[:, 0]))
    return output.z, output.next_y


def _supports(conv: nn.Module, norm: nn.Module, x: Tensor, residual: Tensor | None) -> bool:
    """True if the equations hold for these layers. Equal on ranks that share a span, whatever samples they have."""
    if x.ndim != 4 or torch.compiler.is_compiling() or not is_pointwise(conv):
        return False
    dtype = compute_type(conv.weight)
    return (
        dtype in TYPES
        and is_fusable(norm, x, shared=_is_shared(norm) and len(x) <= norm.span)
        and _has_rows(conv, norm, x)
        and (residual is None or residual.dtype == dtype)
    )


def is_pointwise(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """True for a 1x1 nn.Conv2d of any stride without padding, groups, bias or hooks."""
    return (
        type(conv) is nn.Conv2d
        and (conv.kernel_size, conv.padding, conv.groups) == ((1, 1), (0, 0), 1)
        and conv.bias is None
        and not is_hooked(conv)
    )


def _has_rows(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> bool:
    """True if a whole span has enough rows; the nominal span of a group, whose ranks must decide alike."""
    span = norm.span if _is_shared(norm) else span_of(norm, x) if isinstance(norm, nn.BatchNorm2d) else 0
    pixels = x[:1, :1, :: conv.stride[0], :: conv.stride[1]].shape[2:].numel()
    return span * pixels >= ROWS_PER_CHANNEL * conv.in_channels


def _is_shared(norm: nn.Module) -> TypeGuard[SpanBatchNorm2d]:
    return isinstance(norm, SpanBatchNorm2d) and norm.group_size > 1
