"""The first convolution of a ResNet with zero-padded input channels, and the operations behind it as one kernel.

Tensor cores multiply 16-bit channels in groups of at least four. Images have three, so the convolution runs below its
arithmetic limit; with extra channels of zeros it computes the same result. The weight keeps its three input channels.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from megabatch.kernels import tuning
from megabatch.kernels.dispatch import Backend
from megabatch.kernels.norm.stem import fused_bn_relu_pool
from megabatch.nn.fused.convolution import convolve
from megabatch.nn.fused.norm_act import can_fuse, is_hooked, norm_act, sink_of, span_of, supports

WIDTHS = (4, 8)
"""Numbers of input channels to try where images have fewer."""
TASK = "stem convolution"


def stem_convolution(conv: nn.Conv2d, x: Tensor, backend: Backend) -> Tensor:
    """conv(x); in 16 bit with zero channels added to x and the weight where that was measured to be faster."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if not supports(x, backend) or dtype == torch.float32 or type(conv) is not nn.Conv2d or is_hooked(conv):
        return convolve(conv, x, backend)
    images, weight = x.to(dtype), conv.weight.to(dtype)
    candidates = {tuning.PLAIN: partial(_run_step, conv, images, weight, x.shape[1])}
    candidates |= {
        str(width): partial(_run_step, conv, images, weight, width) for width in WIDTHS if width > x.shape[1]
    }
    # Exact sizes, without rounding: the stem has one shape per resolution and batch size.
    sizes = (*x.shape, *weight.shape, *conv.stride)
    fastest = tuning.table().choose(TASK, sizes, images, candidates)
    return _padded(conv, images, weight, x.shape[1] if fastest == tuning.PLAIN else int(fastest))


def norm_relu_pool(norm: nn.Module, pool: nn.Module, x: Tensor, *, backend: Backend) -> Tensor:
    """pool(relu(norm(x))); one kernel where the norm can be fused and the pool has 3x3 windows of stride 2."""
    if not (_is_3x3_of_stride_2(pool) and can_fuse(norm, x, backend)):
        y: Tensor = pool(norm_act(norm, x, backend=backend))
        return y
    y, _, _ = fused_bn_relu_pool(
        x,
        norm.weight,
        norm.bias,
        span=span_of(norm, x),
        eps=norm.eps,
        sink=sink_of(norm, x),
        backend=backend,
    )
    return y


def _padded(conv: nn.Conv2d, x: Tensor, weight: Tensor, width: int) -> Tensor:
    """conv(x) in the dtype of x, with x and the weight zero-padded to `width` input channels."""
    padding = (0, 0, 0, 0, 0, width - x.shape[1])
    if width > x.shape[1]:
        layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        x, weight = (functional.pad(t, padding).contiguous(memory_format=layout) for t in (x, weight))
    y: Tensor = conv._conv_forward(x, weight, conv.bias)
    return y


@torch.no_grad()
def _run_step(conv: nn.Conv2d, x: Tensor, weight: Tensor, width: int) -> Tensor:
    """The part of a training step to time: forward and the weight's gradient, which is returned."""
    # A leaf of its own, so that timing adds nothing to the parameter's gradient.
    with torch.enable_grad():
        leaf = weight.detach().requires_grad_()
        y = _padded(conv, x.detach(), leaf, width)
    (gradient,) = torch.autograd.grad(y, leaf, torch.zeros_like(y))
    return gradient


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _is_3x3_of_stride_2(pool: nn.Module) -> bool:
    """True for nn.MaxPool2d of 3x3 windows, stride 2 and padding 1, with default options and no hooks."""
    if type(pool) is not nn.MaxPool2d or is_hooked(pool):
        return False
    pairs = [value if isinstance(value, tuple) else (value, value) for value in _sizes_of(pool)]
    return pairs == [(3, 3), (2, 2), (1, 1), (1, 1)] and not (pool.ceil_mode or pool.return_indices)


def _sizes_of(pool: nn.MaxPool2d) -> list[int | tuple[int, ...]]:
    return [pool.kernel_size, pool.stride, pool.padding, pool.dilation]
