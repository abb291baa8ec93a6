"""Steps on parameters that FSDP2 shards, against the same steps on whole parameters; two gloo processes."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes
from torch import Tensor, nn

from megabatch.errors import UserError
from megabatch.optim.ema import WeightAverage
from megabatch.optim.groups import param_groups
from megabatch.optim.lamb import LAMB
from megabatch.optim.lars import LARS
from megabatch.optim.muon import Muon
from megabatch.optim.rmsprop_warmup import RMSpropWarmup
from megabatch.optim.sgd import SGD
from megabatch.optim.shampoo import Shampoo

MAKERS: dict[str, Any] = {
    "lars": LARS,
    "lars corrected": lambda groups, **values: LARS(groups, momentum_form="inside_corrected", nesterov=True, **values),
    "lars update": lambda groups, **values: LARS(groups, denominator="update", trust_clip=True, **values),
    "lars one by one": lambda groups, **values: LARS(groups, foreach=False, **values),
    "lamb": LAMB,
    "sgd": SGD,
    "rmsprop": RMSpropWarmup,
}

DECAY = {"weight_decay": 0.01}


def model() -> nn.Module:
    """Layers that divide unevenly: the second rank has fewer rows, or none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(45, 1))


def train(net: nn.Module, make: Any, images: Tensor) -> torch.optim.Optimizer:
    optimizer = make(param_groups(net, **DECAY), lr=0.1)
    for lr in (0.1, 0.4, 0.2):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()
    return optimizer


def errors(kind: str, dtype: torch.dtype, mesh_shape: tuple[int, ...]) -> list[float]:
    """Relative differences of weights and state after three steps, sharded and whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, images = model().to(dtype), torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    names = ("replicas", "shards")[-len(mesh_shape) :]
    sharded: Any = copy.deepcopy(whole)
    fully_shard(sharded, mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names))
    of_whole, of_sharded = train(whole, MAKERS[kind], images), train(sharded, MAKERS[kind], images)
    pairs = list(zip(sharded.parameters(), whole.parameters(), strict=True))
    pairs += [
        (values, of_whole.state[other][name])
        for mine, other in list(pairs)
        for name, values in of_sharded.state[mine].items()
    ]
    return [((one.full_tensor() - other).norm() / other.norm()).item() for one, other in pairs]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_step_on_sharded_parameters_equals_that_on_whole_ones(kind: str) -> None:
    for differences in run_processes(2, errors, kind, torch.float64, (2,)):
        assert len(differences) >= 10
        assert max(differences) < 1e-12


@pytest.mark.parametrize(("dtype", "mesh_shape"), [(torch.float32, (2,)), (torch.float64, (2, 1))])
def test_sharded_steps_in_float32_and_with_replicas_are_right_too(
    dtype: torch.dtype, mesh_shape: tuple[int, ...]
) -> None:
    for differences in run_processes(2, errors, "lars", dtype, mesh_shape):
        assert max(differences) < 1e-6


def resumed_and_uninterrupted() -> tuple[list[Tensor], list[Tensor]]:
    from torch.distributed.fsdp import fully_shard

    images, results = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)), []
    for interrupted in (True, False):
        net = model()
        fully_shard(net)
        optimizer = train(net, LARS, images)
        if interrupted:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = LARS(param_groups(net, **DECAY), lr=0.1)
            optimizer.load_state_dict(saved)
        optimizer.step()
        results.append([p.full_tensor().detach() for p in net.parameters()])
    return results[0], results[1]


def test_the_state_of_sharded_parameters_loads() -> None:
    for resumed, uninterrupted in run_processes(2, resumed_and_uninterrupted):
        assert all(map(torch.equal, resumed, uninterrupted))


def averages_and_copies() -> tuple[float, float]:
    """Differences from the weights' average of a whole model, and of 16-bit copies from the weights."""
    from torch.distributed.fsdp import fully_shard

    images, averaged = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)), []
    whole = model()
    sharded: Any = copy.deepcopy(whole)
    fully_shard(sharded)
    for net in (whole, sharded):
        average = WeightAverage(net, half_life_epochs=1.0)
        for _ in range(2):
            train(net, SGD, images)
            average.update(0.5)
        with average.swapped():
            averaged.append([p.detach().clone() for p in net.parameters()])
    copies = {p: p.detach().bfloat16() for p in sharded.parameters()}
    optimizer = LARS(sharded.parameters(), lr=0.1, copies=copies)
    optimizer.step()
    differences = [(one.full_tensor() - other).abs().max().item() for other, one in zip(*averaged, strict=True)]
    rounded = [(copies[p] - p.detach().bfloat16()).full_tensor().abs().max().item() for p in copies]
    return max(differences), max(rounded)


def test_averages_and_16_bit_copies_of_sharded_weights_follow_them() -> None:
    for difference, rounded in run_processes(2, averages_and_copies):
        assert difference < 1e-6
        assert rounded == 0


def refusals() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh, messages = init_device_mesh("cpu", (2,)), []
    for kind, options in ((Shard(0), {"fused": True}), (Partial(), {})):
        parameter = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [kind], run_check=False))
        parameter.grad = torch.ones_like(parameter)
        try:
            LARS([parameter], lr=0.1, **options).step()
        except UserError as error:
            messages.append(str(error))
    for make in (Muon, Shampoo):
        parameter = nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Shard(0)], run_check=False))
        try:
            make([parameter], lr=0.1)
        except UserError as error:
            messages.append(str(error))
    dist.barrier()
    return messages


def test_kernels_partial_sums_and_sharded_matrices_are_refused() -> None:
    for fused, partial, *matrices in run_processes(2, refusals):
        assert "fused=None works" in fused
        assert "fully_shard(model) works" in partial
        assert len(matrices) == 2
        assert all("shape (4, 2) was given in a group with adapt=True" in message for message in matrices)


def refusals_of_flattened(use_orig_params: bool) -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    net, messages = (
        FullyShardedDataParallel(model(), device_id=torch.device("cpu"), use_orig_params=use_orig_params),
        [],
    )
    makers = (
        lambda: LARS(net.parameters(), 0.1),
        lambda: LAMB(net.parameters(), 0.1),
        lambda: param_groups(net, **DECAY),
    )
    for make in makers:
        try:
            make()
        except UserError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_parameters_that_fsdp1_flattened_are_refused(use_orig_params: bool) -> None:
    for messages in run_processes(2, refusals_of_flattened, use_orig_params):
        assert len(messages) == 3
        assert all("fully_shard(model) works" in message for message in messages)
