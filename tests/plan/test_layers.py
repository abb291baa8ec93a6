"""Layer tables: parameters and operations equal those of the PyTorch models; published counts and ratios."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megabatch import create_model
from megabatch.errors import UserError
from megabatch.plan.layers import forward_flops, layers_of, num_parameters, scaling_ratio

CASES = [
    ("resnet50", 224, 3, "large"),
    ("resnet18", 32, 3, "small"),
    ("resnet34", 96, 3, "large"),
    ("resnet8", 28, 1, "auto"),
    ("resnet8", 28, 1, "pooled"),
    ("vgg8", 32, 3, "auto"),
    ("vgg8", 45, 1, "whitened"),
    ("alexnet_bn", 227, 3, "auto"),
    ("alexnet", 227, 3, "auto"),
]


@pytest.mark.parametrize(("name", "side", "channels", "stem"), CASES)
def test_parameters_tensors_and_operations_are_those_of_the_model(name, side, channels, stem):
    with torch.device("meta"):
        model = create_model(name, num_classes=10, in_channels=channels, stem=stem).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, channels, side, side))
    layers = layers_of(name, resolution=side, num_classes=10, in_channels=channels, stem=stem)
    assert num_parameters(layers) == sum(weight.numel() for weight in model.parameters())
    assert sum(layer.num_tensors for layer in layers) == len(list(model.parameters()))
    assert forward_flops(layers) == counter.get_total_flops()


def test_resnet50_has_161_tensors_25557032_parameters_and_26560_batch_norm_channels():
    layers = layers_of("resnet50")
    assert sum(layer.num_tensors for layer in layers) == 161
    assert num_parameters(layers) == 25_557_032
    assert sum(layer.norm_channels for layer in layers) == 26_560


def test_scaling_ratios_are_those_of_you_et_al_and_so_is_their_quotient():
    """They count 1.5 GFLOP and 61 M parameters, 7.7 GFLOP and 25 M. Version 1.5 of ResNet-50 has 5 % more."""
    alexnet, resnet = (scaling_ratio(layers_of(name)) for name in ("alexnet", "resnet50"))
    assert scaling_ratio(layers_of("alexnet", resolution=227)) == pytest.approx(24.6, rel=0.05)
    assert resnet == pytest.approx(308, rel=0.06)
    assert resnet / alexnet == pytest.approx(12.5, rel=0.15)


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"vgg16.*resnet50"):
        layers_of("vgg16")
