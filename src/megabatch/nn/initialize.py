"""Initial weights from a seed: equal on every worker without a broadcast, independent of other random draws."""

import hashlib
import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from megabatch.errors import UserError

NormLayer = nn.modules.batchnorm._BatchNorm
"""Common base class of nn.BatchNorm1d, 2d and 3d, nn.SyncBatchNorm and SpanBatchNorm2d."""

Scheme = Literal["he_fan_out", "he_fan_in", "lecun_truncated", "alexnet"]
_SCHEMES = ("he_fan_out", "he_fan_in", "lecun_truncated", "alexnet")

TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal truncated to [-2, 2]."""


@torch.no_grad()
def initialize(model: nn.Module, scheme: Scheme, *, seed: int, zero_gamma: bool = False) -> nn.Module:
    """Initialises the weights of `model` in place, by `scheme`, and returns it.

    Each parameter has its own random stream, keyed by (seed, name). Its values do not depend on the order of modules,
    on other draws or on the device, and wrappers (DDP, torch.compile) do not change its name.

    Convolutions, with fan_in or fan_out = channels per group * kernel height * width on that side:

    - "he_fan_out": N(0, 2 / fan_out) (He et al. 2015, arXiv:1502.01852), as in torchvision's ResNet
    - "he_fan_in": N(0, 2 / fan_in), as in Mikami et al. 2018, arXiv:1811.05233
    - "lecun_truncated": variance 1 / fan_in, from a normal truncated at two standard deviations, as in the TPU
      reference of Ying et al. 2018, arXiv:1811.06992
    - "alexnet": N(0, 0.01^2), and biases of 0.1 in layers 2, 4 and 5, as in Caffe's AlexNet

    Linear layers: weights N(0, 0.01^2), biases 0 (Goyal et al. 2017, arXiv:1706.02677, section 5.1). With "alexnet"
    the two hidden linear layers have weights N(0, 0.005^2) and biases 0.1.

    Batch norms: weight 1, bias 0, running statistics reset. With `zero_gamma` the last norm of each residual block has
    weight 0, so that every block starts as the identity (ibid.).

    Raises:
        UserError: `scheme` is none of the four.
    """
    if scheme not in _SCHEMES:
        raise UserError(f"initialization={scheme} was given, needed one of {', '.join(_SCHEMES)}; he_fan_out works")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            _initialize_conv(module, scheme, _stream(seed, f"{name}.weight"))
        elif isinstance(module, nn.Linear):
            _initialize_linear(module, _stream(seed, f"{name}.weight"))
        elif isinstance(module, NormLayer):
            module.reset_parameters()
    if scheme == "alexnet":
        _set_alexnet_exceptions(model, seed)
    if zero_gamma:
        for norm in last_norms(model):
            norm.weight.zero_()
    return model


def last_norms(model: nn.Module) -> Iterator[NormLayer]:
    """The last norm of each residual block: bn3, or else bn2, of a module with a `downsample` (torchvision's names)."""
    for module in model.modules():
        if hasattr(module, "downsample"):
            norm = getattr(module, "bn3", None) or module.bn2
            if isinstance(norm, NormLayer) and norm.affine:
                yield norm


@torch.no_grad()
def weights_digest(model: nn.Module) -> str:
    """Hex SHA-256 of all parameters with names, shapes and dtypes: equal if and only if all bits are equal."""
    digest = hashlib.sha256()
    for name, parameter in sorted((_plain(name), p) for name, p in model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _initialize_conv(conv: nn.Conv2d, scheme: Scheme, stream: torch.Generator) -> None:
    area = math.prod(conv.kernel_size)
    fan_in = conv.in_channels // conv.groups * area
    fan_out = conv.out_channels // conv.groups * area
    if scheme == "lecun_truncated":
        _draw_truncated(conv.weight, math.sqrt(1 / fan_in), stream)
    else:
        variance = {"he_fan_out": 2 / fan_out, "he_fan_in": 2 / fan_in, "alexnet": 0.01**2}[scheme]
        _draw(conv.weight, math.sqrt(variance), stream)
    if conv.bias is not None:
        conv.bias.zero_()


def _initialize_linear(linear: nn.Linear, stream: torch.Generator, std: float = 0.01) -> None:
    _draw(linear.weight, std, stream)
    if linear.bias is not None:
        linear.bias.zero_()


def _set_alexnet_exceptions(model: nn.Module, seed: int) -> None:
    """Caffe's AlexNet: biases 0.1 in layers 2, 4, 5, 6 and 7, and weights N(0, 0.005^2) in layers 6 and 7."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for index, (name, layer) in enumerate(layers):
        if isinstance(layer, nn.Linear) and index < len(layers) - 1:
            _initialize_linear(layer, _stream(seed, f"{name}.weight"), std=0.005)
        if index in {1, 3, 4, 5, 6} and index < len(layers) - 1 and layer.bias is not None:
            layer.bias.fill_(0.1)


def _draw(parameter: Tensor, std: float, stream: torch.Generator) -> None:
    """Draws from N(0, std^2) on the CPU in float32: from the same seed a GPU would draw other numbers."""
    parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=stream))


def _draw_truncated(parameter: Tensor, std: float, stream: torch.Generator) -> None:
    full_std = std / TRUNCATED_STD  # before truncation, so that the truncated values have deviation `std`
    values = torch.empty(parameter.shape)
    nn.init.trunc_normal_(values, 0.0, full_std, -2 * full_std, 2 * full_std, generator=stream)
    parameter.copy_(values)


def _stream(seed: int, name: str) -> torch.Generator:
    key = hashlib.sha256(f"{seed}:{_plain(name)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def _plain(name: str) -> str:
    """A parameter's name without the prefixes of DDP and torch.compile, which may be nested."""
    for prefix in ("module.", "_orig_mod."):
        if name.startswith(prefix):
            return _plain(name.removeprefix(prefix))
    return name
