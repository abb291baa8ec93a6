"""Parameter groups: which parameters decay and adapt."""

import pytest
import torch
from torch import nn

from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.models import create_model
from megabatch.optim.groups import param_groups
from megabatch.optim.lamb import LAMB
from megabatch.optim.lars import LARS
from megabatch.optim.muon import Muon
from megabatch.optim.rmsprop_warmup import RMSpropWarmup
from megabatch.optim.sgd import SGD
from megabatch.optim.shampoo import Shampoo


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def names(model: nn.Module) -> dict[str, list[str]]:
    """Parameter names of each group."""
    return {group["name"]: group["param_names"] for group in param_groups(model, weight_decay=0.1)}


def test_matrices_and_filters_decay_and_adapt_and_norms_and_biases_do_neither() -> None:
    weights, others = param_groups(model(), weight_decay=1e-4)
    assert (weights["name"], weights["param_names"]) == ("weights", ["0.weight", "3.weight"])
    assert (weights["weight_decay"], weights["adapt"]) == (1e-4, True)
    assert (others["name"], others["param_names"]) == ("norm_and_bias", ["0.bias", "1.weight", "1.bias", "3.bias"])
    assert (others["weight_decay"], others["adapt"]) == (0.0, False)


def test_norms_and_biases_may_decay_but_still_do_not_adapt() -> None:
    _, others = param_groups(model(), weight_decay=1e-4, decay_norm_and_bias=True)
    assert (others["weight_decay"], others["adapt"]) == (1e-4, False)


class OwnNorm(nn.LayerNorm):
    pass


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm((3, 4)),
        OwnNorm((3, 4)),
        nn.RMSNorm((3, 4)),
        nn.GroupNorm(2, 4),
        nn.BatchNorm1d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        SpanBatchNorm2d(4, span=2),
        nn.utils.parametrizations.weight_norm(nn.LayerNorm((3, 4))),
    ],
)
def test_parameters_of_a_norm_do_neither_whatever_their_number_of_dimensions(norm: nn.Module) -> None:
    assert names(norm) == {"norm_and_bias": [name for name, _ in norm.named_parameters()]}


def test_the_biases_of_attention_do_neither_also_those_of_three_dimensions() -> None:
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    assert attention.bias_k is not None
    assert attention.bias_k.ndim == 3
    found = names(attention)
    assert found["weights"] == ["in_proj_weight", "out_proj.weight"]
    assert set(found["norm_and_bias"]) == {"in_proj_bias", "bias_k", "bias_v", "out_proj.bias"}


def test_an_embedding_decays_and_adapts() -> None:
    assert names(nn.Embedding(10, 4)) == {"weights": ["weight"]}


def test_a_module_whose_own_name_contains_bias_still_has_weights() -> None:
    net = nn.ModuleDict({"bias": nn.Linear(2, 2)})
    assert names(net) == {"weights": ["bias.weight"], "norm_and_bias": ["bias.bias"]}


class Scaled(nn.Module):
    """Parameters registered on the module itself: a matrix, a vector, a scalar, and a table of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, 3, 4))
        self.gamma = nn.Parameter(torch.ones(4))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))


def test_a_parameter_of_a_module_of_ones_own_decays_if_it_has_two_dimensions_and_is_no_bias() -> None:
    others = ["gamma", "temperature", "relative_position_bias_table"]
    assert names(Scaled()) == {"weights": ["tokens"], "norm_and_bias": others}


def test_a_tied_weight_comes_once() -> None:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    net[1].weight = net[0].weight
    assert names(net) == {"weights": ["0.weight"]}


def test_a_parameter_that_one_of_two_modules_uses_as_a_bias_does_neither() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].register_parameter("bias", net[0].weight)
    assert names(net) == {"weights": ["1.weight"], "norm_and_bias": ["0.weight", "0.bias"]}


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


@pytest.mark.parametrize(
    ("model", "ends"),
    [
        (nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))), ["0.weight", "3.weight"]),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["0.weight", "1.weight"]),
        (nn.Linear(2, 2), ["weight"]),
    ],
)
def test_the_first_and_the_last_weight_may_decay_without_adapting(model: nn.Module, ends: list[str]) -> None:
    groups = {g["name"]: g for g in param_groups(model, weight_decay=0.1, separate_ends=True)}
    assert groups["ends"]["param_names"] == ends
    assert (groups["ends"]["weight_decay"], groups["ends"]["adapt"]) == (0.1, False)
    hidden = groups["weights"]["param_names"] if "weights" in groups else []
    assert sorted([*hidden, *ends]) == sorted(name for name, p in model.named_parameters() if p.ndim > 1)


def test_a_frozen_first_layer_does_not_make_the_second_an_end() -> None:
    with torch.device("meta"):
        net = create_model("vgg8", num_classes=10, stem="whitened")
    groups = {g["name"]: g["param_names"] for g in param_groups(net, weight_decay=0.1, separate_ends=True)}
    assert groups["ends"] == ["fc.weight"]
    convolutions = [f"stages.{stage}.conv{number}.weight" for stage in range(3) for number in (1, 2)]
    assert groups["weights"] == convolutions


@pytest.mark.parametrize("name", ["resnet50", "alexnet", "resnet8"])
def test_the_models_of_the_recipes_are_split_by_number_of_dimensions(name: str) -> None:
    """Their norms and biases all have one dimension, and no other parameter has."""
    with torch.device("meta"):
        net = create_model(name, num_classes=10)
    named = dict(net.named_parameters())
    assert names(net) == {
        "weights": [name for name, p in named.items() if p.ndim > 1],
        "norm_and_bias": [name for name, p in named.items() if p.ndim <= 1],
    }


@pytest.mark.parametrize("kind", [LARS, LAMB, SGD, RMSpropWarmup, Muon, Shampoo, torch.optim.SGD])
def test_every_optimizer_takes_the_groups(kind: type[torch.optim.Optimizer]) -> None:
    optimizer = kind(param_groups(model(), weight_decay=1e-4), lr=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0.0]
