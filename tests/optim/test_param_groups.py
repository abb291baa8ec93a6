"""Which tensors decay and which adapt."""

import pytest
import torch
from torch import nn

from megabatch.optim.lamb import LAMB
from megabatch.optim.lars import LARS
from megabatch.optim.param_groups import param_groups
from megabatch.optim.rmsprop_warmup import RMSpropWarmup
from megabatch.optim.sgd import SGD


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def test_matrices_and_filters_decay_and_adapt_and_vectors_do_neither() -> None:
    weights, vectors = param_groups(model(), weight_decay=1e-4)
    assert (weights["name"], weights["param_names"]) == ("weights", ["0.weight", "3.weight"])
    assert (weights["weight_decay"], weights["adapt"]) == (1e-4, True)
    assert (vectors["name"], vectors["param_names"]) == ("norm_and_bias", ["0.bias", "1.weight", "1.bias", "3.bias"])
    assert (vectors["weight_decay"], vectors["adapt"]) == (0.0, False)


def test_vectors_may_decay_but_still_do_not_adapt() -> None:
    _, vectors = param_groups(model(), weight_decay=1e-4, decay_norm_and_bias=True)
    assert (vectors["weight_decay"], vectors["adapt"]) == (1e-4, False)


def test_every_trainable_tensor_comes_exactly_once() -> None:
    net = model()
    net[3].bias = None
    net[0].bias.requires_grad_(False)
    net.append(net[0])  # shared
    listed = [p for group in param_groups(net, weight_decay=0.1) for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in net.parameters() if p.requires_grad}
    assert len(listed) == len({id(p) for p in listed})


def test_an_empty_group_is_left_out() -> None:
    assert [g["name"] for g in param_groups(nn.Linear(2, 2, bias=False), weight_decay=0.1)] == ["weights"]


@pytest.mark.parametrize("kind", [LARS, LAMB, SGD, RMSpropWarmup, torch.optim.SGD])
def test_every_optimizer_takes_the_groups(kind: type[torch.optim.Optimizer]) -> None:
    optimizer = kind(param_groups(model(), weight_decay=1e-4), lr=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0.0]
