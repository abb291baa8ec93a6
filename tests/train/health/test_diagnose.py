"""Which layer of a diverged run is named."""

import pytest
import torch
from torch import nn

from megabatch.train.health.diagnose import first_not_finite
from megabatch.train.precision import Precision

FP32 = Precision("fp32", torch.device("cpu"))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 3))


def test_the_first_layer_whose_weights_are_not_finite_is_named():
    model = net()
    model[2].weight.data[0, 0, 0, 0] = torch.nan
    model[4].weight.data[0, 0] = torch.inf
    assert first_not_finite(model, torch.randn(2, 1, 8, 8), FP32) == "the weight of 2"


def test_the_first_output_that_overflows_is_named():
    model = net()
    model[2].weight.data.fill_(1e38)
    model[0].weight.data.fill_(1e2)
    assert first_not_finite(model, torch.ones(2, 1, 8, 8), FP32) == "the output of 2"


def test_an_overflow_of_fp16_alone_is_found_in_fp16():
    model = net()
    model[0].weight.data.fill_(1e4)
    images = torch.ones(2, 1, 8, 8)
    assert first_not_finite(model, images, FP32) == "the loss"
    assert first_not_finite(model, images, Precision("fp16", torch.device("cpu"))) == "the output of 0"


def test_images_that_are_not_finite_are_named_before_any_layer():
    images = torch.randn(2, 1, 8, 8)
    images[1, 0, 3, 3] = torch.nan
    assert first_not_finite(net(), images, FP32) == "the input images"


def test_where_the_forward_is_finite_a_gradient_is_named():
    model = net()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model[2].bias.grad[1] = torch.inf
    assert first_not_finite(model, torch.randn(2, 1, 8, 8), FP32) == "the gradient of 2.bias"


@pytest.mark.parametrize("broken", [True, False])
def test_no_hook_is_left_behind(broken):
    model = net()
    if broken:
        model[0].weight.data[0] = torch.nan
    first_not_finite(model, torch.randn(2, 1, 8, 8), FP32)
    assert not any(layer._forward_hooks for layer in model)
