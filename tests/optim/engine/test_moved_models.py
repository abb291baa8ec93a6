"""Steps on a model that changed its dtype or device after earlier steps: the state follows."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics, finish_step
from megabatch.nn.batch_norm.layer import convert
from megabatch.optim.ema import WeightAverage
from megabatch.optim.lamb import LAMB
from megabatch.optim.lars import LARS
from megabatch.optim.rmsprop_warmup import RMSpropWarmup
from megabatch.optim.sgd import SGD

MOVES = [
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float64),
]


def step(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Tensor]:
    for number, parameter in enumerate(model.parameters()):
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.grad = values.to(parameter)
    optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(("before", "after"), MOVES)
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("make", [SGD, LARS, LAMB, RMSpropWarmup])
def test_a_step_after_a_move_is_that_of_an_optimizer_that_loads_the_state(
    make: Any, foreach: bool | None, before: torch.dtype, after: torch.dtype
) -> None:
    model = nn.Linear(5, 3).to(before)
    optimizer = make(model.parameters(), lr=0.1, foreach=foreach)
    step(optimizer, model)
    model.to(after)
    twin = copy.deepcopy(model)
    fresh = make(twin.parameters(), lr=0.1, foreach=foreach)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        moved, expected = step(optimizer, model), step(fresh, twin)
        assert all(map(torch.equal, moved, expected))
    wide = torch.float64 if after == torch.float64 else torch.float32
    values = [v for states in optimizer.state.values() for v in states.values()]
    assert {value.dtype for value in values} == {wide}


@pytest.mark.parametrize("collects", [False, True])
@pytest.mark.parametrize("after", [torch.float64, torch.bfloat16, torch.float16])
def test_batch_norm_statistics_and_averaged_weights_follow_a_model(after: torch.dtype, collects: bool) -> None:
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), span=4)
    collect_statistics(model, collects)
    average, images = WeightAverage(model, half_life_epochs=1.0), 2 * torch.randn(10, 3, 6, 6) + 1

    def forward(net: nn.Module, dtype: torch.dtype) -> Tensor:
        net(images.to(dtype))
        finish_step(net, eval_stats="running_all_reduced")
        return torch.stack([net[1].running_mean, net[1].running_var])

    forward(model, torch.float32)
    exact = copy.deepcopy(model).double()
    moved, expected = forward(model.to(after), after), forward(exact, torch.float64)
    assert moved.dtype == after
    torch.testing.assert_close(moved.double(), expected, rtol=0.02, atol=0.02)
    average.update(0.1)
    with average.swapped():
        assert model[0].weight.dtype == after
