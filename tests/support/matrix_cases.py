"""Shared checks of the optimizers that divide matrices among workers: equal results, cost relative to a step."""

from typing import Any

import torch
import torch.distributed as dist
from ranks import run_processes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megabatch.nn.models import create_model
from megabatch.optim.engine.matrices import MatrixCost, MatrixOptimizer
from megabatch.optim.groups import param_groups


def model() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet8", num_classes=10, width=8).to(memory_format=torch.channels_last)


def fill_gradients(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def steps(kind: type[MatrixOptimizer], values: dict[str, Any], saved: Any = None) -> tuple[list[Tensor], Any]:
    """Weights after three steps, or after two more from a saved run; and what is saved then."""
    net = model()
    group = dist.group.WORLD if dist.is_initialized() else None
    optimizer = kind(param_groups(net, weight_decay=1e-3), process_group=group, **values)
    first, last = (0, 3) if saved is None else (3, 5)
    if saved is not None:
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(first, last):
        fill_gradients(net, step)
        optimizer.step()
    return [p.detach() for p in net.parameters()], {"net": net.state_dict(), "optimizer": optimizer.state_dict()}


def assert_same_on_any_number_of_workers(kind: type[MatrixOptimizer], values: dict[str, Any]) -> None:
    """Weights and checkpoints of 1, 2 and 3 gloo workers are equal bit for bit; runs continue on another number."""
    found = {number: run_processes(number, steps, kind, values) for number in (1, 2, 3)}
    weights, saved = found[1][0]
    for ranks in found.values():
        for other, other_saved in ranks:
            assert_equal(other, weights)
            assert_equal(other_saved, saved)
    continued = {number: run_processes(number, steps, kind, values, found[4 - number][0][1]) for number in (1, 2, 3)}
    for ranks in continued.values():
        for rank in ranks:
            assert_equal(rank, continued[1][0])


def assert_equal(one: Any, other: Any) -> None:
    """Nested dicts and sequences of tensors and values."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def resnet50_share_of_step(
    kind: type[MatrixOptimizer], *, num_workers: int, global_batch_size: int
) -> tuple[float, MatrixCost]:
    """The optimizer's flops on one worker over those of its forward and backward, and the cost."""
    with torch.device("meta"):
        net = create_model("resnet50", num_classes=1000)
        images = torch.empty(2, 3, 224, 224)
        with FlopCounterMode(display=False) as counter:
            net(images).sum().backward()
    optimizer = kind(param_groups(net, weight_decay=1e-4, separate_ends=True), lr=0.1)
    cost = optimizer.cost(num_workers)
    per_image = counter.get_total_flops() / 2
    return cost.flops / (per_image * global_batch_size / num_workers), cost
