"""ResNet-18, 34 and 50 (He et al. 2016, arXiv:1512.03385), with the state-dict keys that torchvision's have.

ResNet-50 is "v1.5": the stride of a block is in its 3x3 convolution, not in the first 1x1.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megabatch.nn.fused.bottleneck import FusableBottleneck, fits, run_bottlenecks
from megabatch.nn.fused.convolution import convolve
from megabatch.nn.fused.fuse import Fusable, Fusion, is_hooked, norm_act
from megabatch.nn.fused.stem import norm_relu_pool, stem_convolution
from megabatch.nn.initialize import last_norms

Norm = Callable[[int], nn.Module]


class BasicBlock(Fusable):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, *, norm: Norm, blur_pool: bool = False) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, channels, 3, stride, blur_pool=blur_pool)
        self.bn1 = norm(channels)
        self.conv2 = convolution(channels, channels, 3)
        self.bn2 = norm(channels)
        self.downsample = shortcut(in_channels, channels, stride, norm=norm, blur_pool=blur_pool)

    def forward(self, x: Tensor) -> Tensor:
        y = norm_act(self.bn1, convolve(self.conv1, x, self.fusion), fusion=self.fusion)
        y = convolve(self.conv2, y, self.fusion)
        return norm_act(self.bn2, y, residual=residual(self.downsample, x, self.fusion), fusion=self.fusion)


class Bottleneck(FusableBottleneck):
    """1x1 to fewer channels, 3x3, 1x1 to four times as many, and a shortcut."""

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
        if fits(self, x):
            return run_bottlenecks([self], x)
        y = norm_act(self.bn1, convolve(self.conv1, x, self.fusion), fusion=self.fusion)
        y = norm_act(self.bn2, convolve(self.conv2, y, self.fusion), fusion=self.fusion)
        y = convolve(self.conv3, y, self.fusion)
        return norm_act(self.bn3, y, residual=self.shortcut(x), fusion=self.fusion)

    def shortcut(self, x: Tensor) -> Tensor:
        """What is added to the branch: the input, or the shortcut of it."""
        return residual(self.downsample, x, self.fusion)


class ResNet(Fusable):
    """Stem, four stages of residual blocks, global average, linear. Input (N, in_channels, H, W), output (N, classes).

    `small_stem`: a 3x3 convolution of stride 1 and no pooling in front, for images of 32 to 64 px.
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
        x = norm_relu_pool(self.bn1, self.maxpool, stem_convolution(self.conv1, x, self.fusion), fusion=self.fusion)
        return global_average_then_linear(self._stages(x), self.fc)

    def _stages(self, x: Tensor) -> Tensor:
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        if self.fusion != "plain" and not any(map(is_hooked, stages)):
            blocks = [block for stage in stages for block in stage if isinstance(block, Bottleneck)]
            if len(blocks) == sum(map(len, stages)):
                return run_bottlenecks(blocks, x)
        for stage in stages:
            x = stage(x)
        return x


class BlurConv2d(nn.Conv2d):
    """A strided convolution of an input blurred by (1, 2, 1) x (1, 2, 1) / 16, so that striding does not alias.

    Zhang 2019, arXiv:1904.11486, blurs after an unstrided convolution; this blurs before the strided one, as FFCV's
    ImageNet recipes do, which costs a quarter of the arithmetic. Parameters and state dict are those of nn.Conv2d.
    """

    def forward(self, input: Tensor) -> Tensor:
        channels = input.shape[1]
        taps = torch.tensor([1.0, 2.0, 1.0], dtype=input.dtype, device=input.device) / 4
        kernel = torch.outer(taps, taps).expand(channels, 1, 3, 3)
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
    """A convolution without bias that keeps the size, divided by `stride`; blurred first if strided and `blur_pool`."""
    kind = BlurConv2d if blur_pool and stride > 1 else nn.Conv2d
    return kind(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


def shortcut(
    in_channels: int, out_channels: int, stride: int, *, norm: Norm, blur_pool: bool = False
) -> nn.Sequential | None:
    """A 1x1 convolution and norm where the shape changes; None where the identity will do."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(convolution(in_channels, out_channels, 1, stride, blur_pool=blur_pool), norm(out_channels))


def residual(downsample: nn.Sequential | None, x: Tensor, fusion: Fusion) -> Tensor:
    """What a block adds to its branch: its input, or the shortcut of it."""
    if downsample is None:
        return x
    if fusion == "plain" or is_hooked(downsample):
        shortcut: Tensor = downsample(x)
        return shortcut
    *convolutions, norm = downsample
    for layer in convolutions:
        x = convolve(layer, x, fusion)
    return norm_act(norm, x, relu=False, fusion=fusion)


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
    """Convolutions from N(0, 2 / fan_out) by torch's global generator, for use without `initialize`."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if zero_gamma:
        for norm in last_norms(model):
            nn.init.zeros_(norm.weight)
