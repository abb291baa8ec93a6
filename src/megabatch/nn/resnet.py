"""ResNet-18, 34 and 50 (He et al. 2016, arXiv:1512.03385) with torchvision's state-dict keys.

ResNet-50 is "v1.5": a block's stride is in its 3x3 convolution, not in its first 1x1 convolution. The forwards below
are plain PyTorch; `megabatch.nn.fused` replaces them from outside.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from megabatch.nn.initialize import last_norms

Norm = Callable[[int], nn.Module]


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions: y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, *, norm: Norm, blur_pool: bool = False) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, channels, 3, stride, blur_pool=blur_pool)
        self.bn1 = norm(channels)
        self.conv2 = convolution(channels, channels, 3)
        self.bn2 = norm(channels)
        self.downsample = shortcut(in_channels, channels, stride, norm=norm, blur_pool=blur_pool)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.conv2(y)
        identity = x if self.downsample is None else self.downsample(x)
        y = self.bn2(y)
        y += identity
        return functional.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """Residual block of a 1x1 convolution to `channels`, a 3x3 and a 1x1 to 4 * `channels`, each with batch norm."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, *, norm: Norm, blur_pool: bool = False) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = convolution(in_channels, channels, 1)
        self.bn1 = norm(channels)
        self.conv2 = convolution(channels, channels, 3, stride, blur_pool=blur_pool)
        self.bn2 = norm(channels)
        self.conv3 = convolution(channels, out_channels, 1)
        self.bn3 = norm(out_channels)
        self.downsample = shortcut(in_channels, out_channels, stride, norm=norm, blur_pool=blur_pool)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.conv3(y)
        identity = x if self.downsample is None else self.downsample(x)
        y = self.bn3(y)
        y += identity
        return functional.relu(y, inplace=True)


class ResNet(nn.Module):
    """Stem, four stages of residual blocks, global average pooling, linear layer.

    Input (N, in_channels, H, W), output (N, num_classes). With `small_stem`, for images of 32 to 64 px, the stem is a
    3x3 convolution of stride 1 without pooling; otherwise it is a 7x7 of stride 2 and a 3x3 max pooling of stride 2.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        num_blocks: Sequence[int],
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        norm: Norm = nn.BatchNorm2d,
        zero_gamma: bool = True,
        blur_pool: bool = False,
        small_stem: bool = False,
    ) -> None:
        super().__init__()
        kernel_size, stride = (3, 1) if small_stem else (7, 2)
        self.conv1 = convolution(in_channels, 64, kernel_size, stride)
        self.bn1 = norm(64)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, stride=2, padding=1)
        make = partial(block, norm=norm, blur_pool=blur_pool)
        self.layer1 = stage(make, 64, 64, num_blocks[0], stride=1, expansion=block.expansion)
        self.layer2 = stage(make, 64 * block.expansion, 128, num_blocks[1], stride=2, expansion=block.expansion)
        self.layer3 = stage(make, 128 * block.expansion, 256, num_blocks[2], stride=2, expansion=block.expansion)
        self.layer4 = stage(make, 256 * block.expansion, 512, num_blocks[3], stride=2, expansion=block.expansion)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        reset_weights(self, zero_gamma=zero_gamma)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return global_average_then_linear(x, self.fc)


class BlurConv2d(nn.Conv2d):
    """Strided convolution that first blurs its input by (1, 2, 1) x (1, 2, 1) / 16 against aliasing.

    Zhang 2019, arXiv:1904.11486, blurs the output of an unstrided convolution; this layer blurs the input of the
    strided one, as FFCV's ImageNet recipes do, for a quarter of the multiply-adds. Parameters and state dict are those
    of nn.Conv2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        channels = input.shape[1]
        # Written on the device: values from the host would wait for it, which a CUDA graph refuses.
        kernel = input.new_full((channels, 1, 3, 3), 1 / 16)
        kernel[:, :, 1] *= 2
        kernel[:, :, :, 1] *= 2
        return super().forward(functional.conv2d(input, kernel, padding=1, groups=channels))


def resnet18(**options: Any) -> ResNet:
    """ResNet-18 with the options of `ResNet`: 11,689,512 parameters for 1,000 classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), **options)


def resnet34(**options: Any) -> ResNet:
    """ResNet-34 with the options of `ResNet`: 21,797,672 parameters for 1,000 classes."""
    return ResNet(BasicBlock, (3, 4, 6, 3), **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50 v1.5 with the options of `ResNet`: 25,557,032 parameters for 1,000 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), **options)


def convolution(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, *, blur_pool: bool = False
) -> nn.Conv2d:
    """Convolution without bias, padded to divide the size by `stride`; `BlurConv2d` if strided and `blur_pool`."""
    kind = BlurConv2d if blur_pool and stride > 1 else nn.Conv2d
    return kind(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


def shortcut(
    in_channels: int, out_channels: int, stride: int, *, norm: Norm, blur_pool: bool = False
) -> nn.Sequential | None:
    """A 1x1 convolution and norm where the block changes the shape, else None: the shortcut is the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(convolution(in_channels, out_channels, 1, stride, blur_pool=blur_pool), norm(out_channels))


def stage(
    make: Callable[[int, int, int], nn.Module],
    in_channels: int,
    channels: int,
    depth: int,
    *,
    stride: int,
    expansion: int = 1,
) -> nn.Sequential:
    """`depth` blocks at one resolution; the first changes channels and resolution."""
    first = make(in_channels, channels, stride)
    return nn.Sequential(first, *(make(channels * expansion, channels, 1) for _ in range(depth - 1)))


def global_average_then_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """Logits (N, classes) from the average of `x` (N, C, H, W) over its pixels."""
    logits: Tensor = linear(x.mean((2, 3)))
    return logits


def reset_weights(model: nn.Module, *, zero_gamma: bool) -> None:
    """Draws convolution weights from N(0, 2 / fan_out) with torch's global generator; used where `initialize` is not.

    With `zero_gamma` the last norm of each residual block starts with weight 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if zero_gamma:
        for norm in last_norms(model):
            nn.init.zeros_(norm.weight)
