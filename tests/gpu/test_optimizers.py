"""On a GPU: the same numbers as on a CPU, no wait for the device, and steps replayed from a CUDA graph."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from megabatch.errors import UserError
from megabatch.kernels.dispatch import has_triton
from megabatch.optim.ema import WeightAverage
from megabatch.optim.groups import param_groups
from megabatch.optim.lamb import LAMB
from megabatch.optim.lars import LARS
from megabatch.optim.muon import Muon
from megabatch.optim.rmsprop_warmup import RMSpropWarmup
from megabatch.optim.sgd import SGD

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "lars outside": LARS,
    "lars inside": lambda groups, **values: LARS(groups, momentum_form="inside", **values),
    "lars corrected": lambda groups, **values: LARS(groups, momentum_form="inside_corrected", nesterov=True, **values),
    "lars update": lambda groups, **values: LARS(groups, denominator="update", trust_clip=True, **values),
    "sgd": SGD,
    "sgd corrected": lambda groups, **values: SGD(groups, momentum_form="inside_corrected", **values),
    "lamb": LAMB,
    "rmsprop": RMSpropWarmup,
    "muon": lambda groups, **values: Muon(groups, normalize_weights=True, **values),
}
EVERY = pytest.mark.parametrize("kind", MAKERS)


def small_model(device: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 200))
    return model.to(device, dtype, memory_format=torch.channels_last)


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        p.grad = gradient if p.grad is None else p.grad.copy_(gradient)


@EVERY
def test_a_gpu_and_a_cpu_compute_the_same_weights(kind: str) -> None:
    finals = []
    for device in ("cpu", "cuda"):
        model = small_model(device)
        optimizer = MAKERS[kind](param_groups(model, weight_decay=1e-3), lr=0.1)
        for step in range(4):
            fill_gradients(model, step)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (step + 1)
            optimizer.step()
        finals.append([p.detach().cpu() for p in model.parameters()])
    for one, other in zip(*finals, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@EVERY
def test_no_step_waits_for_the_device(kind: str) -> None:
    model = small_model("cuda")
    optimizer = MAKERS[kind](param_groups(model, weight_decay=1e-3), lr=0.1)
    average = WeightAverage(model, half_life_epochs=1.0)
    fill_gradients(model, 0)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        average.update(0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EVERY
def test_steps_replayed_from_a_cuda_graph_follow_a_rate_that_changes(kind: str) -> None:
    rates = [0.1, 0.2, 0.05, 0.3]
    eager = small_model("cuda")
    optimizer = MAKERS[kind](param_groups(eager, weight_decay=1e-3), lr=0.1)
    captured = small_model("cuda")
    lr = torch.tensor(0.1, device="cuda", dtype=torch.float64)
    capturable = MAKERS[kind](param_groups(captured, weight_decay=1e-3), lr=lr, capturable=True)
    graph: Any = None
    for step, rate in enumerate(rates):
        fill_gradients(eager, step)
        fill_gradients(captured, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        lr.fill_(rate)
        if step == 0:
            capturable.step()  # makes the state
        elif graph is None:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                capturable.step()
        if graph is not None:
            graph.replay()
    for one, other in zip(eager.parameters(), captured.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-9)


def test_a_capture_without_capturable_is_refused() -> None:
    model = small_model("cuda")
    optimizer = LARS(model.parameters(), lr=0.1)
    fill_gradients(model, 0)
    optimizer.step()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.ones(1, device="cuda")
        with pytest.raises(UserError, match="needs capturable=True"):
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_parameters_have_fp32_state(dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.full((64, 64), 0.5, dtype=dtype, device="cuda"))
    optimizer = LARS([w], lr=100.0, trust_coefficient=0.001)
    w.grad = torch.full_like(w, 2000.0)
    optimizer.step()
    assert optimizer.state[w]["momentum_buffer"].dtype == torch.float32
    torch.testing.assert_close(w.data, torch.full_like(w, 0.45))


needs_triton = pytest.mark.skipif(not has_triton(), reason="needs Triton")


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    for step, rate in enumerate(rates):
        fill_gradients(model, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
            if "sgd_share" in group:
                group["sgd_share"] = min(1.0, 0.4 * (step + 1))
        optimizer.step()


@needs_triton
@EVERY
def test_the_kernel_computes_what_the_lists_do_and_the_same_bits_each_time(kind: str) -> None:
    finals = []
    for way in ({"fused": True}, {"fused": True}, {"foreach": True}):
        model = small_model("cuda", torch.float32)
        take_steps(model, MAKERS[kind](param_groups(model, weight_decay=1e-3), lr=0.1, **way), [0.1, 0.2, 0.05])
        finals.append([p.detach() for p in model.parameters()])
    for fused, again, lists in zip(*finals, strict=True):
        assert torch.equal(fused, again)
        torch.testing.assert_close(fused, lists, rtol=2e-5, atol=2e-6)


@needs_triton
def test_without_being_asked_a_gpu_takes_the_kernel_and_a_type_it_cannot_take_the_lists() -> None:
    for dtype, fused in ((torch.float32, True), (torch.bfloat16, True), (torch.float64, False)):
        model = small_model("cuda", dtype)
        optimizer = LARS(model.parameters(), lr=0.1)
        fill_gradients(model, 0)
        assert optimizer._uses_kernel(optimizer.param_groups[0], list(model.parameters())) is fused
        optimizer.step()


@needs_triton
@EVERY
def test_no_fused_step_waits_for_the_device(kind: str) -> None:
    model = small_model("cuda", torch.float32)
    optimizer = MAKERS[kind](param_groups(model, weight_decay=1e-3), lr=0.1, fused=True)
    take_steps(model, optimizer, [0.1])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for group in optimizer.param_groups:
            group["lr"] = 0.2
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_triton
@EVERY
def test_a_captured_fused_step_follows_its_rate_and_leaves_out_what_overflowed(kind: str) -> None:
    """Replays with an overflow between them end where steps outside of a graph end without it."""
    captured, outside = small_model("cuda", torch.float32), small_model("cuda", torch.float32)
    lr = torch.tensor(0.1, device="cuda")
    optimizer, plain = (
        MAKERS[kind](param_groups(m, weight_decay=1e-3), lr=rate, capturable=True, fused=True)
        for m, rate in ((captured, lr), (outside, lr.clone()))
    )
    optimizer.grad_scale, optimizer.found_inf = (torch.ones((), device="cuda") for _ in range(2))
    fill_gradients(captured, 0)
    optimizer.step()  # outside, left out: makes the state and the tables
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    optimizer.grad_scale.fill_(8.0)
    for step, (rate, overflows) in enumerate([(0.1, False), (0.2, False), (9.0, True), (0.05, False)]):
        lr.fill_(rate)
        optimizer.found_inf.fill_(float(overflows))
        fill_gradients(captured, step)
        for p in captured.parameters():
            p.grad.mul_(8.0)
        graph.replay()
        if not overflows:
            plain.param_groups[0]["lr"].fill_(rate)
            fill_gradients(outside, step)
            plain.step()
    for one, other in zip(captured.parameters(), outside.parameters(), strict=True):
        assert torch.equal(one, other)


@EVERY
@pytest.mark.parametrize("fused", [None, False])
def test_the_state_follows_a_model_to_another_device(kind: str, fused: bool | None) -> None:
    model, stays = small_model("cpu", torch.float32), small_model("cpu", torch.float32)
    optimizer = MAKERS[kind](param_groups(model, weight_decay=0.01), lr=0.1, fused=fused)
    other = MAKERS[kind](param_groups(stays, weight_decay=0.01), lr=0.1, fused=fused)
    for seed, device in enumerate(("cpu", "cuda", "cpu")):
        optimizer.zero_grad()
        fill_gradients(model.to(device), seed)
        fill_gradients(stays, seed)
        optimizer.step()
        other.step()
        for mine, exact in zip(model.parameters(), stays.parameters(), strict=True):
            torch.testing.assert_close(mine.cpu(), exact, rtol=1e-5, atol=1e-5)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda:0"))
    yield
    dist.destroy_process_group()


@EVERY
@pytest.mark.usefixtures("one_rank")
def test_a_sharded_model_takes_the_steps_of_a_whole_one(kind: str) -> None:
    whole, sharded = small_model("cuda"), small_model("cuda").to(memory_format=torch.contiguous_format)
    fully_shard(sharded)
    pairs = [(net, MAKERS[kind](param_groups(net, weight_decay=0.01), lr=0.1)) for net in (whole, sharded)]
    images = torch.randn(4, 3, 8, 8, device="cuda", dtype=torch.float64)
    for _ in range(3):
        for net, optimizer in pairs:
            optimizer.zero_grad()
            net(images).square().mean().backward()
            optimizer.step()
    for exact, mine in zip(whole.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), exact, rtol=1e-6, atol=1e-9)
