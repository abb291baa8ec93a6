"""VGG-8, a plain convolutional network for 32 px images that reaches 94 % on CIFAR-10 within ten epochs."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.nn.resnet import Norm, convolution


class VGG8(nn.Module):
    """Stem, three stages of two 3x3 convolutions, global maximum, linear layer: the net of Jordan 2024 with ReLU.

    The stem is a 2x2 convolution with bias, without padding, to 8 channels for each input channel. The stages have
    `width`, 4 and 4 times `width` channels; in each, 2x2 max pooling follows the first convolution, and batch norm and
    ReLU each of them. With width 64 there are 2.0 million parameters and 118 million multiply-adds per colour image of
    32 px. Input (N, in_channels, H, W) with H and W of 17 or more, output (N, num_classes). Source: airbench94,
    arXiv:2404.00498, section 3.

    With `whitened_stem` the stem's weight takes no gradient: set it with `whiten_`.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_channels: int = 3,
        width: int = 64,
        norm: Norm = nn.BatchNorm2d,
        whitened_stem: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8 * in_channels, 2)
        self.stem.weight.requires_grad_(not whitened_stem)
        self.stages = nn.ModuleList(
            VGGStage(before, after, norm=norm)
            for before, after in ((8 * in_channels, width), (width, 4 * width), (4 * width, 4 * width))
        )
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x), inplace=True)
        for stage in self.stages:
            x = stage(x)
        logits: Tensor = self.fc(x.amax((2, 3)))
        return logits


class VGGStage(nn.Module):
    """y = relu(bn1(pool(conv1(x)))), then relu(bn2(conv2(y))); pool is 2x2 maximum."""

    def __init__(self, in_channels: int, channels: int, *, norm: Norm) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, channels, 3)
        self.pool = nn.MaxPool2d(2)
        self.bn1 = norm(channels)
        self.conv2 = convolution(channels, channels, 3)
        self.bn2 = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.pool(self.conv1(x))), inplace=True)
        return functional.relu(self.bn2(self.conv2(x)), inplace=True)


@torch.no_grad()
def whiten_(convolution: nn.Conv2d, images: Tensor, *, eps: float = 5e-4) -> nn.Conv2d:
    """Sets the weight of a first convolution so that it whitens patches of `images`, in place, and returns it.

        C = mean of p p^T over all patches p of k x k pixels,   C = V diag(l) V^T
        weight = [V^T / sqrt(l + eps), -V^T / sqrt(l + eps)]

    Outputs before the bias are uncorrelated and have mean square l / (l + eps); of each, the negative follows, since
    ReLU keeps one side. Images are (N, in_channels, H, W), normalised as in training; a few thousand suffice. The bias
    becomes 0. Computed in float64 on the CPU. Eigenvectors have the sign that makes their sum positive, so equal images
    give equal weights up to rounding; several workers should broadcast one worker's. Source: Page 2018, "How to train
    your ResNet"; Jordan 2024, arXiv:2404.00498, section 3.2.

    Raises:
        UserError: the convolution has another number of output channels than 2 in_channels k k, or groups.
    """
    patch = convolution.weight[0].numel()
    if convolution.out_channels != 2 * patch or convolution.groups != 1:
        raise UserError(
            f"a convolution with {convolution.out_channels} output channels and groups={convolution.groups} was given, "
            f"needed: {2 * patch} output channels, two for each value of a patch, and groups=1"
        )
    products, count = torch.zeros(patch, patch, dtype=torch.float64), 0
    for part in torch.split(images, 100):
        columns = functional.unfold(part.cpu().double(), convolution.kernel_size).transpose(0, 1).reshape(patch, -1)
        products, count = products + columns @ columns.T, count + columns.shape[1]
    values, vectors = torch.linalg.eigh(products / count)
    vectors *= torch.where(vectors.sum(0) < 0, -1.0, 1.0)
    filters = (vectors / (values + eps).sqrt()).T
    convolution.weight.copy_(torch.cat([filters, -filters]).view_as(convolution.weight))
    if convolution.bias is not None:
        convolution.bias.zero_()
    return convolution
