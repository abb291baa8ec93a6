"""Steps whose rates are tensors: the same results, and no value read on the host, as a CUDA graph requires."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megabatch.optim.lamb import LAMB
from megabatch.optim.lars import LARS
from megabatch.optim.muon import Muon
from megabatch.optim.rmsprop_warmup import RMSpropWarmup
from megabatch.optim.sgd import SGD

Maker = Callable[..., torch.optim.Optimizer]


def _muon(param_groups: list[dict[str, Any]], *, foreach: bool | None = None, **values: Any) -> Muon:
    """Muon, which has one backend for all values of `foreach`."""
    del foreach
    return Muon(param_groups, **values)


MAKERS: dict[str, Maker] = {
    "lars outside": LARS,
    "lars inside": lambda groups, **values: LARS(groups, momentum_form="inside", denominator="update", **values),
    "lars corrected": lambda groups, **values: LARS(groups, momentum_form="inside_corrected", nesterov=True, **values),
    "lars clip": lambda groups, **values: LARS(groups, denominator="gradient", trust_clip=True, **values),
    "sgd outside": SGD,
    "sgd inside": lambda groups, **values: SGD(groups, momentum_form="inside", **values),
    "sgd corrected": lambda groups, **values: SGD(groups, momentum_form="inside_corrected", nesterov=True, **values),
    "lamb": LAMB,
    "lamb clip": lambda groups, **values: LAMB(groups, trust_clip=True, **values),
    "rmsprop": RMSpropWarmup,
    "muon": _muon,
    "muon rms": lambda groups, **values: _muon(groups, normalize_weights=True, scale="rms", **values),
}
EVERY = pytest.mark.parametrize("kind", MAKERS)
BACKENDS = pytest.mark.parametrize("foreach", [None, True, False])
STEPS: list[dict[str, float]] = [
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "beta2": 0.99, "sgd_share": 0.2},
    {"lr": 0.4, "momentum": 0.8, "weight_decay": 0.02, "beta2": 0.98, "sgd_share": 0.7},
    {"lr": 0.2, "momentum": 0.95, "weight_decay": 0.0, "beta2": 0.95, "sgd_share": 1.0},
    {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01, "beta2": 0.99, "sgd_share": 1.0},
]
"""Values that a schedule changes from step to step."""


class NothingIsRead(TorchDispatchMode):
    """Refuses to copy a tensor's value to the host, as .item(), bool(), int() and float() do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor's value was read on the host"
        return func(*args, **(kwargs or {}))


def groups(dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))

    weights = [parameter(8, 3, 3, 3).data.to(memory_format=torch.channels_last), parameter(30, 20).data]
    return [{"params": [nn.Parameter(w) for w in weights]}, {"params": [parameter(30)], "adapt": False}]


def fill_gradients(optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters(optimizer):
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_rates(optimizer: torch.optim.Optimizer, values: dict[str, float]) -> None:
    """Replaces numbers and overwrites tensors."""
    for group in optimizer.param_groups:
        for name, value in values.items():
            if isinstance(group.get(name), Tensor):
                group[name].fill_(value)
            elif name in group:
                group[name] = value


def in_tensors(kind: str, param_groups: list[dict[str, Any]], **values: Any) -> torch.optim.Optimizer:
    """A capturable optimizer with every rate in a tensor that all groups share."""
    dtype = param_groups[0]["params"][0].dtype
    rates = {name: torch.tensor(0.5, dtype=dtype) for name in ("lr", "momentum", "weight_decay")}
    if kind.startswith("lamb"):
        rates["beta2"] = torch.tensor(0.5, dtype=dtype)
    return MAKERS[kind](param_groups, **rates, capturable=True, **values)


def test_reading_a_tensor_is_noticed() -> None:
    for read in (float, bool, int, Tensor.item):
        with pytest.raises(AssertionError, match="was read"), NothingIsRead():
            read(torch.ones(()))


@EVERY
@BACKENDS
def test_rates_in_tensors_give_the_same_steps_as_numbers(kind: str, foreach: bool | None) -> None:
    numbers = MAKERS[kind](groups(), lr=0.5, foreach=foreach)
    tensors = in_tensors(kind, groups(), foreach=foreach)
    for seed, values in enumerate(STEPS):
        for optimizer in (numbers, tensors):
            set_rates(optimizer, values)
            fill_gradients(optimizer, seed)
            optimizer.step()
    for p, q in zip(parameters(numbers), parameters(tensors), strict=True):
        torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-11, atol=1e-12)


@EVERY
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_reads_a_tensor_on_the_host(kind: str, foreach: bool | None, dtype: torch.dtype) -> None:
    optimizer = in_tensors(kind, groups(dtype), foreach=foreach)
    for seed, values in enumerate(STEPS):
        set_rates(optimizer, values)
        fill_gradients(optimizer, seed)
        with NothingIsRead():
            optimizer.step()


@EVERY
def test_no_step_replaces_a_tensor_that_a_cuda_graph_would_read(kind: str) -> None:
    optimizer = in_tensors(kind, groups())
    fill_gradients(optimizer, 0)
    optimizer.step()
    before = [
        [(name, id(value)) for name, value in g.items() if isinstance(value, Tensor)] for g in optimizer.param_groups
    ]
    states = [{name: id(value) for name, value in optimizer.state[p].items()} for p in parameters(optimizer)]
    fill_gradients(optimizer, 1)
    optimizer.step()
    assert before == [
        [(name, id(value)) for name, value in g.items() if isinstance(value, Tensor)] for g in optimizer.param_groups
    ]
    assert states == [{name: id(value) for name, value in optimizer.state[p].items()} for p in parameters(optimizer)]


@EVERY
def test_a_state_dict_moves_a_run_between_numbers_and_tensors(kind: str) -> None:
    """A checkpoint of a captured run resumes on a machine without a GPU, and the reverse."""
    unbroken = MAKERS[kind](groups(), lr=0.5)
    for seed in (0, 1):
        set_rates(unbroken, STEPS[seed])
        fill_gradients(unbroken, seed)
        unbroken.step()
    tensors = in_tensors(kind, groups())
    numbers = MAKERS[kind](groups(), lr=0.5, foreach=True)
    backend = numbers.param_groups[0]["foreach"]  # True, if the optimizer has it
    for other, saved in ((tensors, unbroken), (numbers, tensors)):
        for p, q in zip(parameters(other), parameters(unbroken), strict=True):
            p.data.copy_(q.data)
        other.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert isinstance(tensors.param_groups[0]["lr"], Tensor)
    assert tensors.param_groups[0]["capturable"]
    assert not any(isinstance(value, Tensor) for group in numbers.param_groups for value in group.values())
    assert numbers.param_groups[0]["foreach"] == backend
    for optimizer in (unbroken, tensors, numbers):
        for seed in (2, 3):
            set_rates(optimizer, STEPS[seed])
            fill_gradients(optimizer, seed)
            optimizer.step()
    for p, q, r in zip(parameters(unbroken), parameters(tensors), parameters(numbers), strict=True):
        torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(r.detach(), p.detach(), rtol=1e-11, atol=1e-12)


def test_a_checkpoint_without_the_key_fused_loads() -> None:
    optimizer = SGD(groups(), lr=0.5)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["fused"]
    optimizer.load_state_dict(saved)
    fill_gradients(optimizer, 0)
    optimizer.step()
    assert optimizer.param_groups[0]["fused"] is None


@EVERY
@BACKENDS
def test_copies_in_16_bit_follow_the_weights(kind: str, foreach: bool | None) -> None:
    param_groups = groups(torch.float32)
    some = [p for group in param_groups for p in group["params"]][1:]
    copies = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in some}
    with_copies = MAKERS[kind](param_groups, lr=0.5, foreach=foreach, copies=copies)
    without = MAKERS[kind](groups(torch.float32), lr=0.5, foreach=foreach)
    for optimizer in (with_copies, without):
        fill_gradients(optimizer, 0)
        optimizer.step()
    for p, q in zip(parameters(with_copies), parameters(without), strict=True):
        assert torch.equal(p, q)
    for p, written in copies.items():
        assert torch.equal(written, p.detach().bfloat16())


@EVERY
@BACKENDS
def test_gradients_in_16_bit_give_the_same_steps_as_equal_values_in_fp32(kind: str, foreach: bool | None) -> None:
    narrow = MAKERS[kind](groups(torch.float32), lr=0.5, foreach=foreach)
    wide = MAKERS[kind](groups(torch.float32), lr=0.5, foreach=foreach)
    for p in parameters(narrow)[:2]:
        p.grad_dtype = None
    for seed in (0, 1):
        for optimizer in (narrow, wide):
            fill_gradients(optimizer, seed)
            for p in parameters(optimizer)[:2]:
                assert p.grad is not None
                p.grad = p.grad.bfloat16() if optimizer is narrow else p.grad.bfloat16().float()
            optimizer.step()
    for p, q in zip(parameters(narrow), parameters(wide), strict=True):
        assert torch.equal(p, q)
