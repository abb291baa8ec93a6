"""A model's convolutions by the compiled CPU kernels, where those support the layer."""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from megabatch.kernels.cpu import conv as cpu_conv
from megabatch.kernels.dispatch import Backend
from megabatch.nn.fused.norm_act import is_hooked


def convolve(layer: nn.Module, x: Tensor, backend: Backend) -> Tensor:
    """layer(x) of a convolution, in autocast's dtype; with "auto" by the CPU kernels where they support it."""
    if backend == "auto" and x.device.type == "cpu" and not torch.compiler.is_compiling() and _is_plain(layer):
        images, weight = x, layer.weight
        # Under autocast x and the weight are cast here, as torch's own convolution does.
        if torch.is_autocast_enabled("cpu") and cpu_conv.is_available(dtype := torch.get_autocast_dtype("cpu")):
            images, weight = x.to(dtype), layer.weight.to(dtype)
        if cpu_conv.supports(images, weight):
            return cpu_conv.conv2d(images, weight, stride=layer.stride[0], padding=int(layer.padding[0]))
    y: Tensor = layer(x)
    return y


def compute_type(weight: Tensor) -> torch.dtype:
    """Dtype in which a convolution with this weight computes: autocast's, or the weight's own."""
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def _is_plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """True for nn.Conv2d without bias, groups, dilation or hooks, of equal stride and padding in both directions."""
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
