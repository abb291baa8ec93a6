"""Creates models by name."""

from typing import Literal

from torch import nn

from megabatch.errors import UserError
from megabatch.model_names import MODELS
from megabatch.nn.alexnet import alexnet, alexnet_bn
from megabatch.nn.resnet import Norm, resnet18, resnet34, resnet50
from megabatch.nn.small import resnet8
from megabatch.nn.vgg import VGG8

SMALL_IMAGE = 64
"""Largest image size, in pixels per side, for which stem="auto" is the small stem."""


def create_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    norm: Norm = nn.BatchNorm2d,
    zero_gamma: bool = True,
    blur_pool: bool = False,
    width: int = 16,
    image_size: int = 224,
    stem: Literal["auto", "small", "large", "pooled", "whitened"] = "auto",
) -> nn.Module:
    """Returns a new model, with weights drawn from torch's global generator, in float32 on the CPU.

    Parameters of the models, for 1,000 classes and 3 channels: resnet18 11.7 million, resnet34 21.8, resnet50 25.6
    (v1.5), alexnet and alexnet_bn 61.0. resnet8 has 78,000, for 10 classes and 1 channel, vgg8 of width 64 2.0 million.
    ResNet state-dict keys are those of torchvision. For weights that are equal on every worker use
    `megabatch.nn.initialize.initialize`; for fused kernels call `set_fusion` on the model.

    Args:
        name: "resnet8", "vgg8", "resnet18", "resnet34", "resnet50", "alexnet" or "alexnet_bn".
        num_classes: K of the logits (N, K) that the model returns.
        in_channels: C of the images (N, C, H, W) that the model takes.
        norm: function from a number of channels to a norm layer, such as `nn.BatchNorm2d` or
            `functools.partial(SpanBatchNorm2d, span=32)`. "alexnet" has no norm.
        zero_gamma: weight 0 in the last norm of each residual block, so that each block starts as its shortcut (Goyal
            et al. 2017, arXiv:1706.02677, section 5.1). ResNets only.
        blur_pool: blur before strided convolutions in blocks, against aliasing (Zhang 2019, arXiv:1904.11486).
            ResNets only.
        width: channels of the first stage of "resnet8" and "vgg8"; other models ignore it.
        image_size: pixels per side; stem="auto" is the small stem up to 64, else the large one. The model accepts
            other sizes as well.
        stem: of ResNet-18, 34 and 50. "small" is a 3x3 convolution of stride 1 without pooling, "large" a 7x7 one of
            stride 2 with max pooling; weights of one do not fit the other. "pooled" is for resnet8: a 3x3 convolution
            of stride 1 and 2x2 max pooling in place of a stride of 2. "whitened" is for vgg8: its weight takes no
            gradient, and is to be set by `megabatch.nn.vgg.whiten_`.

    Raises:
        UserError: `name` is none of the seven.
    """
    small_stem = image_size <= SMALL_IMAGE if stem == "auto" else stem == "small"
    match name:
        case "resnet8":
            return resnet8(
                num_classes=num_classes,
                in_channels=in_channels,
                width=width,
                norm=norm,
                zero_gamma=zero_gamma,
                blur_pool=blur_pool,
                pooled_stem=stem == "pooled",
            )
        case "vgg8":
            return VGG8(
                num_classes=num_classes,
                in_channels=in_channels,
                width=width,
                norm=norm,
                whitened_stem=stem == "whitened",
            )
        case "resnet18" | "resnet34" | "resnet50":
            make = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}[name]
            return make(
                num_classes=num_classes,
                in_channels=in_channels,
                norm=norm,
                zero_gamma=zero_gamma,
                blur_pool=blur_pool,
                small_stem=small_stem,
            )
        case "alexnet":
            return alexnet(num_classes=num_classes, in_channels=in_channels)
        case "alexnet_bn":
            return alexnet_bn(num_classes=num_classes, in_channels=in_channels, norm=norm)
    raise UserError(f"name={name} was given, needed one of {', '.join(MODELS)}; resnet50 works")
