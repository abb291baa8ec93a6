"""A ResNet's first convolution with more input channels than images have, and what stands behind it in one kernel.

Matrix units multiply 16-bit channels in groups of four and more. Images have three, so the convolution is slower than
its arithmetic; with channels of zeros it computes the same. The weights stay those of three.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from megabatch.kernels import tuning
from megabatch.kernels.norm.stem import fused_bn_relu_pool
from megabatch.nn.fused.convolution import convolve
from megabatch.nn.fused.fuse import Fusion, backend_of, can_fuse, is_hooked, norm_act, sink_of, span_of, wants

WIDTHS = (4, 8)
"""Input channels that are tried where there are fewer."""
TASK = "stem convolution"


def stem_convolution(conv: nn.Conv2d, x: Tensor, fusion: Fusion) -> Tensor:
    """conv(x), with channels of zeros added to both where that was measured to be faster, in 16 bit alone."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if not wants(x, fusion) or dtype == torch.float32 or type(conv) is not nn.Conv2d or is_hooked(conv):
        return convolve(conv, x, fusion)
    images, weight = x.to(dtype), conv.weight.to(dtype)
    ways = {tuning.PLAIN: partial(_both_ways, conv, images, weight, x.shape[1])}
    ways |= {str(width): partial(_both_ways, conv, images, weight, width) for width in WIDTHS if width > x.shape[1]}
    sizes = (*x.shape, *weight.shape, *conv.stride)
    way = tuning.table().choose(TASK, sizes, images, ways)
    return _padded(conv, images, weight, x.shape[1] if way == tuning.PLAIN else int(way))


def norm_relu_pool(norm: nn.Module, pool: nn.Module, x: Tensor, *, fusion: Fusion) -> Tensor:
    """pool(relu(norm(x))), in one kernel where the pool is a ResNet's and the norm can be fused."""
    if not (_is_3x3_of_stride_2(pool) and can_fuse(norm, x, fusion)):
        y: Tensor = pool(norm_act(norm, x, fusion=fusion))
        return y
    y, _, _ = fused_bn_relu_pool(
        x,
        norm.weight,
        norm.bias,
        span=span_of(norm, x),
        eps=norm.eps,
        sink=sink_of(norm),
        backend=backend_of(fusion),
    )
    return y


def _padded(conv: nn.Conv2d, x: Tensor, weight: Tensor, width: int) -> Tensor:
    """conv(x) in the type of x, with `width` input channels."""
    more = (0, 0, 0, 0, 0, width - x.shape[1])
    if width > x.shape[1]:
        layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        x, weight = (functional.pad(t, more).contiguous(memory_format=layout) for t in (x, weight))
    y: Tensor = conv._conv_forward(x, weight, conv.bias)
    return y


@torch.no_grad()
def _both_ways(conv: nn.Conv2d, x: Tensor, weight: Tensor, width: int) -> Tensor:
    """What a step computes of it, to be timed: forward and the weight's gradient."""
    with torch.enable_grad():
        leaf = weight.detach().requires_grad_()
        y = _padded(conv, x.detach(), leaf, width)
    (gradient,) = torch.autograd.grad(y, leaf, torch.zeros_like(y))
    return gradient


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _is_3x3_of_stride_2(pool: nn.Module) -> bool:
    """With a border of 1, nothing else, and nobody who looks at it."""
    if type(pool) is not nn.MaxPool2d or is_hooked(pool):
        return False
    pairs = [value if isinstance(value, tuple) else (value, value) for value in _sizes_of(pool)]
    return pairs == [(3, 3), (2, 2), (1, 1), (1, 1)] and not (pool.ceil_mode or pool.return_indices)


def _sizes_of(pool: nn.MaxPool2d) -> list[int | tuple[int, ...]]:
    return [pool.kernel_size, pool.stride, pool.padding, pool.dilation]
