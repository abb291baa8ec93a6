"""Layers of the models, as the numbers that time and communication depend on. Imports no torch.

A layer is a convolution or linear layer together with the batch norm, activation and addition that follow it. Counts
are per image: multiply-adds are two operations.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from megabatch.errors import UserError


@dataclass(frozen=True, eq=False)  # compared by identity, so that times of layers can be cached cheaply
class Layer:
    """Operations, elements and parameters of one layer."""

    name: str
    num_parameters: int  # batch norm included
    num_tensors: int  # parameter tensors
    forward_flops: float  # per image
    in_elements: int  # per image
    out_elements: int
    norm_channels: int = 0  # 0 without batch norm
    joins: bool = False  # adds a residual


BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet8": (1, 1, 1)}
SMALL_STEM_PIXELS = 64  # nn.models: images up to this size get the small stem


@functools.cache
def layers_of(
    model: str,
    *,
    resolution: int = 224,
    num_classes: int = 1000,
    in_channels: int = 3,
    width: int = 16,
    stem: str = "auto",
) -> tuple[Layer, ...]:
    """Returns the layers of `model` in forward order.

    Raises UserError if the model is unknown.
    """
    if model in {"alexnet", "alexnet_bn"}:
        return tuple(_alexnet(resolution, num_classes, in_channels, norm=model == "alexnet_bn"))
    if model == "vgg8":
        return tuple(_vgg8(resolution, num_classes, in_channels, width))
    if model not in BLOCKS:
        names = ", ".join([*BLOCKS, "vgg8", "alexnet", "alexnet_bn"])
        raise UserError(f"model {model!r} is unknown, needed one of {names}")
    if stem == "auto":
        stem = "strided" if model == "resnet8" else "small" if resolution <= SMALL_STEM_PIXELS else "large"
    return tuple(_resnet(model, resolution, num_classes, in_channels, width, stem))


def forward_flops(layers: tuple[Layer, ...]) -> float:
    """Floating-point operations of a forward pass of one image; backward takes about twice as many."""
    return sum(layer.forward_flops for layer in layers)


def num_parameters(layers: tuple[Layer, ...]) -> int:
    """Parameters of all layers."""
    return sum(layer.num_parameters for layer in layers)


def scaling_ratio(layers: tuple[Layer, ...]) -> float:
    """Operations of an image's forward pass per parameter: the larger, the easier to scale (You et al. 2017, table)."""
    return forward_flops(layers) / num_parameters(layers)


def _resnet(model: str, side: int, num_classes: int, channels: int, width: int, stem: str) -> Iterator[Layer]:
    first = width if model == "resnet8" else 64
    kernel, stride = {"strided": (3, 2), "large": (7, 2)}.get(stem, (3, 1))
    yield _convolution("conv1", channels, first, kernel, stride, side)
    side, channels = -(-side // stride), first
    if stem in {"large", "pooled"}:
        side = side // 2 if stem == "pooled" else -(-side // 2)
    for index, num_blocks in enumerate(BLOCKS[model]):
        for block in range(num_blocks):
            stride = 2 if block == 0 and index > 0 else 1
            made = _block(f"layer{index + 1}.{block}", model, channels, first << index, stride, side)
            yield from made
            channels, side = (first << index) * (4 if model == "resnet50" else 1), -(-side // stride)
    yield _linear("fc", channels, num_classes)


def _vgg8(side: int, num_classes: int, channels: int, width: int) -> Iterator[Layer]:
    yield _convolution("stem", channels, 8 * channels, 2, 1, side, norm=False, after=side - 1)
    side, channels = side - 1, 8 * channels
    for index, out in enumerate((width, 4 * width, 4 * width)):
        yield _convolution(f"stages.{index}.conv1", channels, out, 3, 1, side)
        side = side // 2
        yield _convolution(f"stages.{index}.conv2", out, out, 3, 1, side)
        channels = out
    yield _linear("fc", channels, num_classes)


def _block(name: str, model: str, channels: int, width: int, stride: int, side: int) -> Iterator[Layer]:
    out, after = width * (4 if model == "resnet50" else 1), -(-side // stride)
    if stride > 1 or channels != out:
        yield _convolution(f"{name}.downsample", channels, out, 1, stride, side)
    if model == "resnet50":
        yield _convolution(f"{name}.conv1", channels, width, 1, 1, side)
        yield _convolution(f"{name}.conv2", width, width, 3, stride, side)
        yield _convolution(f"{name}.conv3", width, out, 1, 1, after, joins=True)
    else:
        yield _convolution(f"{name}.conv1", channels, out, 3, stride, side)
        yield _convolution(f"{name}.conv2", out, out, 3, 1, after, joins=True)


def _convolution(
    name: str,
    channels: int,
    out: int,
    kernel: int,
    stride: int,
    side: int,
    *,
    groups: int = 1,
    norm: bool = True,
    after: int | None = None,
    joins: bool = False,
) -> Layer:
    after = -(-side // stride) if after is None else after
    weights = out * channels // groups * kernel * kernel
    num_parameters = weights + (2 if norm else 1) * out
    return Layer(
        name,
        num_parameters,
        3 if norm else 2,
        2.0 * weights * after * after,
        channels * side * side,
        out * after * after,
        norm_channels=out if norm else 0,
        joins=joins,
    )


def _linear(name: str, channels: int, out: int) -> Layer:
    return Layer(name, channels * out + out, 2, 2.0 * channels * out, channels, out)


def _alexnet(side: int, num_classes: int, channels: int, *, norm: bool) -> Iterator[Layer]:
    sides = [(side - 11) // 4 + 1]
    sides += [_pooled(sides[0])]
    sides += [_pooled(sides[1])]
    yield _convolution("conv1", channels, 96, 11, 4, side, norm=norm, after=sides[0])
    yield _convolution("conv2", 96, 256, 5, 1, sides[1], groups=2, norm=norm)
    yield _convolution("conv3", 256, 384, 3, 1, sides[2], norm=norm)
    yield _convolution("conv4", 384, 384, 3, 1, sides[2], groups=2, norm=norm)
    yield _convolution("conv5", 384, 256, 3, 1, sides[2], groups=2, norm=norm)
    yield _linear("fc6", 256 * 6 * 6, 4096)
    yield _linear("fc7", 4096, 4096)
    yield _linear("fc8", 4096, num_classes)


def _pooled(side: int) -> int:
    """Side after pooling with window 3 and stride 2, rounded up."""
    return -(-(side - 3) // 2) + 1
