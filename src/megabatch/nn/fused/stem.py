"""The first convolution of a ResNet with zero-padded input channels, and the operations behind it as one kernel.

Tensor cores multiply 16-bit channels in groups of at least four. Images have three, so the convolution runs below its
arithmetic limit; with extra channels of zeros it computes the same result. The weight keeps its three input channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from megabatch.kernels.dispatch import Backend
from megabatch.kernels.norm.stem import fused_bn_relu_pool
from megabatch.nn.fused.convolution import convolve
from megabatch.nn.fused.norm_act import can_fuse, is_hooked, norm_act, sink_of, span_of, supports

WIDTH = 4
"""Input channels of the convolution where images have fewer; NVIDIA's MLPerf code pads to as many (recalled)."""


def stem_convolution(conv: nn.Conv2d, x: Tensor, backend: Backend) -> Tensor:
    """conv(x); in 16 bit, where the GPU kernels run, with zero channels added to x and the weight, up to `WIDTH`.

    16-bit images with `WIDTH` channels are taken to be padded already, as a loader's `padded_channels` does.
    """
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    is_padded = isinstance(conv, nn.Conv2d) and conv.in_channels < x.shape[1] == WIDTH and x.element_size() == 2
    fits = is_padded or (isinstance(conv, nn.Conv2d) and x.shape[1] == conv.in_channels)  # else torch names the fault
    can_pad = supports(x, backend) and dtype != torch.float32 and type(conv) is nn.Conv2d and not is_hooked(conv)
    if not (fits and can_pad):
        return convolve(conv, x[:, : conv.in_channels] if is_padded else x, backend)
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_last else torch.contiguous_format
    images, weight = (_padded(tensor.to(dtype), layout) for tensor in (x, conv.weight))
    y: Tensor = conv._conv_forward(images, weight, conv.bias)
    return y


def _padded(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """`tensor` with zero channels added up to `WIDTH`."""
    if tensor.shape[1] >= WIDTH:
        return tensor
    padding = (0, 0, 0, 0, 0, WIDTH - tensor.shape[1])
    return functional.pad(tensor, padding).contiguous(memory_format=layout)


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


def _is_3x3_of_stride_2(pool: nn.Module) -> bool:
    """True for nn.MaxPool2d of 3x3 windows, stride 2 and padding 1, with default options and no hooks."""
    if type(pool) is not nn.MaxPool2d or is_hooked(pool):
        return False
    pairs = [value if isinstance(value, tuple) else (value, value) for value in _sizes_of(pool)]
    return pairs == [(3, 3), (2, 2), (1, 1), (1, 1)] and not (pool.ceil_mode or pool.return_indices)


def _sizes_of(pool: nn.MaxPool2d) -> list[int | tuple[int, ...]]:
    return [pool.kernel_size, pool.stride, pool.padding, pool.dilation]
