"""On a GPU: the same numbers as on a CPU, no wait for the device, and steps replayed from a CUDA graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from megabatch.errors import UserError
from megabatch.optim import LAMB, LARS, SGD, RMSpropWarmup, WeightAverage, param_groups

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
}
EVERY = pytest.mark.parametrize("kind", MAKERS)


def small_model(device: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 36, 200))
    return model.to(device, torch.float64, memory_format=torch.channels_last)


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


def test_rmsprop_warmup_on_a_gpu_computes_the_same_weights() -> None:
    finals = []
    for device in ("cpu", "cuda"):
        model = small_model(device)
        optimizer = RMSpropWarmup(param_groups(model, weight_decay=1e-3), lr=0.1)
        for epoch in (5, 10, 12, 13):
            optimizer.set_epoch(epoch)
            fill_gradients(model, epoch)
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
