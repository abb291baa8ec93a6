"""`convert` on networks of timm and torchvision: the same network where a span covers the whole batch."""

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from public_models import importable
from torch import Tensor, nn

from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics, finish_step, span_layers
from megabatch.nn.batch_norm.layer import convert

pytestmark = pytest.mark.slow

TIMM = {
    "resnetv2_50": 49,
    "regnety_004": 53,
    "efficientnet_b0": 49,
    "mobilenetv3_small_100": 34,
    "densenet121": 121,
    "mobilenetv2_100": 52,
    "dpn48b": 54,
    "cspresnet50": 55,
    "ghostnet_100": 80,
    "xception41": 84,
    "inception_v3": 94,
    "resnet18": 20,
    "resnet50d": 55,
    "ecaresnet26t": 31,
    "repvgg_a0": 61,
    "hrnet_w18_small": 91,
    "vgg11_bn": 8,
    "levit_128s": 52,
    "nf_resnet26": 0,
    "convnext_atto": 0,
}
"""Networks of as many families, and the number of their batch norms."""
TORCHVISION = {
    "resnet18": 20,
    "mobilenet_v2": 52,
    "densenet121": 121,
    "regnet_y_400mf": 53,
    "efficientnet_b0": 49,
    "shufflenet_v2_x0_5": 56,
    "squeezenet1_0": 0,
}
PIXELS = {"inception_v3": 128, "levit_128s": 224}
COUNT = 4
ROWS = COUNT * 196
"""Rows of the largest input of a norm: LeViT's see one row per token."""


class Results(NamedTuple):
    """Logits in both modes, gradients of the training step, buffers after it."""

    evaluated: Tensor
    trained: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


@pytest.fixture(scope="module")
def has_torchvision() -> Iterator[bool]:
    with importable() as has_torchvision:
        yield has_torchvision


def step(model: nn.Module, images: Tensor) -> Results:
    with torch.no_grad():
        evaluated = model.eval()(images)
    torch.manual_seed(1)  # dropout and stochastic depth
    trained = model.train()(images)
    trained.square().sum().backward()
    finish_step(model, eval_stats="running_all_reduced")
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Results(evaluated, trained.detach(), gradients, dict(model.named_buffers()))


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).double().norm() / other.double().norm().clamp(min=1e-12))


@pytest.mark.usefixtures("has_torchvision")
@pytest.mark.parametrize("name", TIMM)
def test_a_converted_network_of_timm_is_the_same_network(name: str) -> None:
    check(pytest.importorskip("timm").create_model, name, TIMM[name])


@pytest.mark.parametrize("name", TORCHVISION)
def test_a_converted_network_of_torchvision_is_the_same_network(name: str, has_torchvision: bool) -> None:
    if not has_torchvision:
        pytest.skip("torchvision is not installed")
    check(importlib.import_module("torchvision.models").get_model, name, TORCHVISION[name])


def check(make: Callable[..., nn.Module], name: str, num_norms: int) -> None:
    torch.manual_seed(0)
    model = make(name, num_classes=10)
    images = torch.randn(COUNT, 3, PIXELS.get(name, 64), PIXELS.get(name, 64))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    converted = convert(copy.deepcopy(model), span=ROWS)
    collect_statistics(converted)
    assert len(list(span_layers(converted))) == num_norms
    ours, theirs = step(converted, images), step(model, images)
    assert relative(ours.evaluated, theirs.evaluated) < 1e-5
    assert relative(ours.trained, theirs.trained) < 1e-5
    for mine, exact in ((ours.gradients, theirs.gradients), (ours.buffers, theirs.buffers)):
        assert mine.keys() == exact.keys()
        assert max((relative(mine[key], exact[key]) for key in exact), default=0.0) < 1e-5
