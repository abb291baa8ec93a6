"""AlexNet (Krizhevsky et al. 2012) as one tower with grouped convolutions, and AlexNet-BN.

Both follow Caffe's reference model, which You et al. 2017, arXiv:1709.05011, trained: 227 px crops, convolutions 2, 4
and 5 in two groups, local response normalisation after ReLU and before pooling, 60,965,224 parameters.

AlexNet-BN is B. Ginsburg's variant for far larger batches: no response normalisation, and batch norm between each
convolution and its ReLU. The published solver files confirm only that batch norm replaces response normalisation. We
assume that every convolution has a batch norm and that the linear layers have dropout and no batch norm.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional

from megabatch.nn.resnet import Norm


class AlexNet(nn.Module):
    """Five convolutions and three linear layers. Input (N, in_channels, H, W) with H and W at least 23.

    Caffe's last pooling (window 3, stride 2, from 13x13 to 6x6) is adaptive here: at 227 px its windows are the same,
    and at other resolutions the linear layers still receive 6x6. With `norm` the network is AlexNet-BN.
    """

    def __init__(self, *, num_classes: int = 1000, in_channels: int = 3, norm: Norm | None = None) -> None:
        super().__init__()
        layers = [
            *_convolution(1, in_channels, 96, 11, norm=norm, stride=4, response_norm=True),
            ("pool1", nn.MaxPool2d(3, 2, ceil_mode=True)),
            *_convolution(2, 96, 256, 5, norm=norm, groups=2, response_norm=True),
            ("pool2", nn.MaxPool2d(3, 2, ceil_mode=True)),
            *_convolution(3, 256, 384, 3, norm=norm),
            *_convolution(4, 384, 384, 3, norm=norm, groups=2),
            *_convolution(5, 384, 256, 3, norm=norm, groups=2),
            ("pool5", nn.AdaptiveMaxPool2d(6)),
        ]
        self.features = nn.Sequential(OrderedDict(layers))
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x))

    def classify(self, features: Tensor) -> Tensor:
        """Logits (N, num_classes) from the convolutional features (N, 256, 6, 6); dropout in training."""
        x = features.flatten(1)
        x = functional.dropout(functional.relu(self.fc6(x)), 0.5, self.training)
        x = functional.dropout(functional.relu(self.fc7(x)), 0.5, self.training)
        logits: Tensor = self.fc8(x)
        return logits


def alexnet(*, num_classes: int = 1000, in_channels: int = 3) -> AlexNet:
    """AlexNet with response normalisation: 60,965,224 parameters for 1,000 classes."""
    return AlexNet(num_classes=num_classes, in_channels=in_channels)


def alexnet_bn(*, num_classes: int = 1000, in_channels: int = 3, norm: Norm = nn.BatchNorm2d) -> AlexNet:
    """AlexNet-BN: 60,966,600 parameters for 1,000 classes."""
    return AlexNet(num_classes=num_classes, in_channels=in_channels, norm=norm)


def _convolution(
    number: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    norm: Norm | None,
    stride: int = 1,
    groups: int = 1,
    response_norm: bool = False,
) -> list[tuple[str, nn.Module]]:
    """Named layers of one stage: convolution, norm or none, ReLU, response norm or none.

    An unstrided convolution is padded to keep the size; a strided one is not padded.
    """
    padding = 0 if stride > 1 else kernel_size // 2
    bias = norm is None
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias)
    layers: list[tuple[str, nn.Module]] = [(f"conv{number}", conv)]
    if norm is not None:
        layers.append((f"bn{number}", norm(out_channels)))
    layers.append((f"relu{number}", nn.ReLU(inplace=True)))
    if norm is None and response_norm:
        layers.append((f"norm{number}", nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)))
    return layers
