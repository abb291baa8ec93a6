"""VGG-8: sizes, its whitened stem, and runs that start from it."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.nn.models import create_model
from megabatch.nn.vgg import VGG8, whiten_


@pytest.mark.parametrize("side", [17, 32, 45])
def test_logits_of_images_of_any_size_from_17_pixels(side):
    assert VGG8(width=8, num_classes=7)(torch.randn(3, 3, side, side)).shape == (3, 7)


def test_a_model_of_width_64_has_two_million_parameters_and_a_frozen_stem_on_request():
    model = create_model("vgg8", num_classes=10, width=64, stem="whitened")
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_972_802
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["stem.weight"]
    assert all(parameter.requires_grad for parameter in VGG8(width=8).parameters())


@pytest.mark.parametrize(("channels", "kernel"), [(3, 2), (1, 3)])
def test_whitened_outputs_are_uncorrelated_with_mean_square_one_and_come_in_pairs(channels, kernel):
    torch.manual_seed(0)
    mixed = torch.randn(3, 3)[:channels, :channels] + 2 * torch.eye(channels)
    images = torch.einsum("dc,nchw->ndhw", mixed, torch.randn(250, channels, 12, 12)).cumsum(3) / 4
    patch = channels * kernel**2
    stem = whiten_(nn.Conv2d(channels, 2 * patch, kernel), images, eps=0.0)
    outputs = stem(images).detach().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs[:patch], -outputs[patch:])
    products = outputs[:patch] @ outputs[:patch].T / outputs.shape[1]
    torch.testing.assert_close(products, torch.eye(patch, dtype=torch.float64), atol=2e-3, rtol=0)


def test_eps_bounds_the_gain_of_directions_that_images_do_not_have():
    grey = torch.randn(50, 1, 8, 8).expand(-1, 3, -1, -1)  # equal channels: 8 of 12 directions are empty
    stem = whiten_(nn.Conv2d(3, 24, 2), grey, eps=0.01)
    assert stem.weight.abs().max() <= 10
    assert functional.conv2d(grey, stem.weight).pow(2).mean((0, 2, 3))[:8].max() < 1e-6


def test_another_number_of_output_channels_is_refused_with_the_number_needed():
    with pytest.raises(UserError, match="needed: 24 output channels"):
        whiten_(nn.Conv2d(3, 16, 2), torch.zeros(1, 3, 8, 8))
