"""Convolutions of a model by the compiled kernels of a CPU, where `set_fusion` lets them and they serve the layer."""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from megabatch.kernels.cpu import conv as cpu_conv
from megabatch.nn.fused.fuse import Fusion, is_hooked


def convolve(layer: nn.Module, x: Tensor, fusion: Fusion) -> Tensor:
    """layer(x), a convolution's, in the type that autocast gives it."""
    if fusion == "auto" and x.device.type == "cpu" and not torch.compiler.is_compiling() and _is_plain(layer):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if dtype == torch.bfloat16 and cpu_conv.supports(images := x.to(dtype), weight := layer.weight.to(dtype)):
            return cpu_conv.conv2d(images, weight, stride=layer.stride[0], padding=int(layer.padding[0]))
    y: Tensor = layer(x)
    return y


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution of one stride and padding both ways, nothing else, and nobody looks at it."""
    return (
        type(layer) is nn.Conv2d
        and layer.groups == 1
        and layer.bias is None
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and len({*layer.stride}) == len({*layer.padding}) == 1
        and not is_hooked(layer)
    )
