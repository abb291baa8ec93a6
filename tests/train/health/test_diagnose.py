"""Which layer and which samples of a diverged run are named."""

import pytest
import torch
from torch import nn

from megabatch.data.loading.batch import Batch
from megabatch.train.gradients import Objective
from megabatch.train.health.diagnose import Finding, first_not_finite
from megabatch.train.precision import Precision


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 3))


def find(model, images, precision="fp32"):
    batch = Batch(images, torch.zeros(len(images), dtype=torch.int64), len(images))
    return first_not_finite(model, batch, Objective(len(images), 0.0, Precision(precision, torch.device("cpu"))))


def test_the_first_layer_whose_weights_are_not_finite_is_named():
    model = net()
    model[2].weight.data[0, 0, 0, 0] = torch.nan
    model[4].weight.data[0, 0] = torch.inf
    assert find(model, torch.randn(2, 1, 8, 8)) == Finding("the weight of 2", [0, 1])


def test_the_first_output_that_overflows_is_named():
    model = net()
    model[2].weight.data.fill_(1e38)
    model[0].weight.data.fill_(1e2)
    assert find(model, torch.ones(2, 1, 8, 8)) == Finding("the output of 2", [0, 1])


def test_only_the_samples_whose_output_overflows_are_named():
    model = net()
    model[0].weight.data.abs_()
    images = torch.ones(4, 1, 8, 8)
    images[2] = 3e38
    assert find(model, images) == Finding("the output of 0", [2])


def test_an_overflow_of_fp16_alone_is_found_in_fp16():
    model = net()
    model[0].weight.data.fill_(1e4)
    images = torch.ones(2, 1, 8, 8)
    assert find(model, images) is None
    assert find(model, images, "fp16").where == "the output of 0"


def test_images_that_are_not_finite_are_named_before_any_layer():
    images = torch.randn(3, 1, 8, 8)
    images[1, 0, 3, 3] = torch.nan
    assert find(net(), images) == Finding("an input image", [1])


class InfiniteGradient(torch.autograd.Function):
    """Identity whose gradient is infinite."""

    @staticmethod
    def forward(_, value):
        return value.clone()

    @staticmethod
    def backward(_, gradient):
        return gradient * torch.inf


class Layer(nn.Linear):
    def forward(self, images):
        return InfiniteGradient.apply(super().forward(images))


def test_where_the_forward_is_finite_the_first_gradient_of_backward_is_named():
    model = net()
    model[4] = Layer(32, 3)
    assert find(model, torch.randn(2, 1, 8, 8)).where == "the gradient of 4.bias"


@pytest.mark.parametrize("broken", [True, False])
def test_no_hook_and_no_gradient_is_left_behind(broken):
    model = net()
    if broken:
        model[0].weight.data[0] = torch.nan
    find(model, torch.randn(2, 1, 8, 8))
    assert not any(layer._forward_hooks for layer in model)
    assert all(parameter.grad is None for parameter in model.parameters())
