"""Models by name."""

from torch import nn

from megabatch.errors import UserError
from megabatch.nn.alexnet import alexnet, alexnet_bn
from megabatch.nn.resnet import Norm, resnet18, resnet34, resnet50
from megabatch.nn.small import resnet8

SMALL_IMAGE = 64
"""Up to this many pixels a side, ResNet-18, 34 and 50 begin with a small stem."""


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
) -> nn.Module:
    """The model of that name, for images of `image_size` px a side.

    `width` counts for resnet8 alone, `zero_gamma` and `blur_pool` for the ResNets.

    Raises:
        UserError: no such model.
    """
    small_stem = image_size <= SMALL_IMAGE
    match name:
        case "resnet8":
            return resnet8(
                num_classes=num_classes,
                in_channels=in_channels,
                width=width,
                norm=norm,
                zero_gamma=zero_gamma,
                blur_pool=blur_pool,
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
    raise UserError(f"no model is called {name}; resnet50, resnet34, resnet18, resnet8, alexnet or alexnet_bn works")
