"""Sections of `gpu.py` about whole training steps: their speed, their kernels, and their gradients."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpu_models import (
    Half,
    Step,
    fusion_here,
    half_step,
    has_torchvision,
    our_model,
    plain_step,
    torchvision_model,
)
from gpu_session import Session, free, graph_of, guarded
from gpu_traffic import Kernel, Traffic, by_kind
from megabatch.bench.timing import measure
from megabatch.kernels.dispatch import Backend
from megabatch.nn.fused.fuse import Fusion, set_fusion
from megabatch.nn.loss import cross_entropy_sum

BATCHES = (1024, 32, 256, 64, 16)
COMPILE_S, EAGER_S, OTHERS_S = 75.0, 15.0, 150.0
"""Seconds that a case may take at most, and that sections after the steps are left; with less a case is skipped."""
PASSES = 9
ELEMENTS = 11.1e6
"""Convolution outputs of one image at 224 px, and how often a fully fused step must move them (docs/decisions/0005)."""


def batch(session: Session, count: int) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    pixels = 32 if session.quick else 224
    images = session.images(count, 3, pixels, torch.float32)
    labels = torch.randint(1000, (count,), device=session.device, generator=torch.Generator(session.device))
    return images, labels


def step_speed(session: Session) -> None:
    """Images a second for each way of taking a step but torch.compile, the largest batch first."""
    _speeds(session, compiled=False)


def compiled_step_speed(session: Session) -> None:
    """The same of torch.compile, which takes a minute a case."""
    if session.is_cuda:
        _speeds(session, compiled=True)
    else:
        session.add("compiled", "all", skipped="minutes of compiling on a CPU tell nothing about a GPU")


def _speeds(session: Session, *, compiled: bool) -> None:
    section, needed = ("compiled", COMPILE_S) if compiled else ("step", EAGER_S + OTHERS_S)
    for count in (2,) if session.quick else BATCHES:
        for name, make in _ways(session, count, compiled=compiled):
            case = f"{name}, batch {count}"
            if session.has_time_for(section, case, 0.0 if session.quick else needed):
                guarded(session, section, case, lambda c=case, n=count, m=make: _timed(session, section, c, n, m))


def _ways(session: Session, count: int, *, compiled: bool) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Name and maker of each step."""
    dtype = torch.float16 if session.is_cuda else torch.bfloat16

    def own(fusion: Fusion) -> nn.Module:
        model = our_model(session.device, quick=session.quick)
        set_fusion(model, fusion)
        return model

    def plain(model: nn.Module, backend: Backend = "reference") -> Step:
        return plain_step(model, *batch(session, count), dtype, compiled=compiled, backend=backend)

    kind = "compiled" if compiled else "eager"
    fusion = fusion_here(session.device)
    if not compiled:
        yield "ours fused, 16-bit weights, LARS", lambda: fused_step(session, count)
        yield "ours fused", lambda: plain(own(fusion), "auto")
    if has_torchvision():
        yield f"torchvision {kind}", lambda: plain(torchvision_model(session.device, quick=session.quick))
    yield f"ours {kind}", lambda: plain(own("plain"))


def fused_step(session: Session, count: int) -> Step:
    """The fastest step there is here."""
    dtype = torch.float16 if session.is_cuda else torch.bfloat16
    half = Half(our_model(session.device, quick=session.quick), dtype, fusion_here(session.device))
    images, labels = batch(session, count)
    return half_step(half, images.to(dtype), labels)


def _timed(session: Session, section: str, case: str, count: int, make: Callable[[], Step]) -> None:
    """The step as it is and, on a GPU, as one CUDA graph."""
    if session.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    step = make()
    _add(session, section, case, count, step)
    if session.is_cuda:
        case = f"{case}, one graph"
        guarded(session, section, case, lambda: _add(session, section, case, count, graph_of(step)))


def _add(session: Session, section: str, case: str, count: int, work: Step) -> None:
    queued = 1 if session.is_cuda else 0
    timing = measure(work, warmup=1 if session.quick else 5, repeats=2 if session.quick else 15, queued=queued)
    rate = count / timing.median_s
    facts: dict[str, Any] = {"batch": count, "images_per_s": rate}
    if session.is_cuda:
        facts["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if "copy_bytes_per_s" in session.ceilings and not session.quick:
        facts["of_fused_floor"] = rate * PASSES * ELEMENTS * 2 / session.ceilings["copy_bytes_per_s"]
    session.add(section, case, timing, **facts)


def profile(session: Session) -> None:
    """What the fused step spends its time on: each kind of kernel with its bytes and its share of the GPU's limits."""
    count = 2 if session.quick else 1024
    step = fused_step(session, count)
    for _ in range(3 if session.is_cuda else 1):
        step()
    with Traffic() as traffic:
        step()
    moved = traffic.total_bytes()
    floor = moved / session.ceilings["copy_bytes_per_s"] if "copy_bytes_per_s" in session.ceilings else None
    session.add("profile", "all that the step moves", bytes=moved, bytes_per_image=moved / count, floor_s=floor)
    kernels = _kernel_times(step) if session.is_cuda else {}
    for kind, seconds in sorted(by_kind(kernels).items(), key=lambda item: -item[1].seconds):
        _add_kind(session, traffic, kind, seconds, sum(kernel.seconds for kernel in kernels.values()))
    for kind in sorted(set(traffic.work) - set(by_kind(kernels))):
        session.add("profile", f"{kind}, not timed", calls=traffic.work[kind].calls, bytes=traffic.work[kind].bytes)
    longest = sorted(kernels.items(), key=lambda item: -item[1].seconds)[:25]
    for name, kernel in longest:
        session.add("profile", f"kernel {name[:80]}", calls=kernel.calls, total_ms=1e3 * kernel.seconds)


def _kernel_times(step: Step) -> dict[str, Kernel]:
    """Calls and seconds of each GPU kernel of one step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    rows = [row for row in trace.key_averages() if row.device_time_total]
    return {row.key: Kernel(row.count, row.device_time_total / 1e6) for row in rows}


def _add_kind(session: Session, traffic: Traffic, kind: str, kernel: Kernel, total_s: float) -> None:
    """One kind with what it moved and multiplied, as shares of a copy's and of a product's rate."""
    facts: dict[str, Any] = {"calls": kernel.calls, "total_ms": 1e3 * kernel.seconds, "share": kernel.seconds / total_s}
    work = traffic.work.get(kind)
    if work is not None:
        rate = work.bytes / kernel.seconds
        facts |= {"bytes": work.bytes, "bytes_per_s": rate, "flop_per_s": work.flop / kernel.seconds}
        if "copy_bytes_per_s" in session.ceilings:
            facts["of_copy_rate"] = rate / session.ceilings["copy_bytes_per_s"]
        if "flop_per_s" in session.ceilings:
            facts["of_product_rate"] = work.flop / kernel.seconds / session.ceilings["flop_per_s"]
    session.add("profile", kind, **facts)


def choices(session: Session) -> None:
    """Which way the fused steps took for each part and shape, by measuring here."""
    found = {
        key: way for path in sorted(tables(session).glob("*.json")) for key, way in json.loads(path.read_text()).items()
    }
    for key, way in found.items():
        session.add("choices", key, way=way)
    if not found:
        session.add("choices", "of convolutions", skipped="nothing was measured: that needs a GPU")


def tables(session: Session) -> Path:
    """Where the choices of this run are kept, so that each run measures for itself."""
    return session.output / "kernels"


def gradients(session: Session) -> None:
    """Relative error of every gradient against float64: the fused step's and plain autocast's, on the same inputs."""
    dtype = torch.float16 if session.is_cuda else torch.bfloat16
    count, pixels = (4, 64) if session.quick else (16, 128)
    images = session.images(count, 3, pixels, torch.float32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(count, device=session.device)
    exact = _gradients(session, images.double(), labels, "plain", torch.float64)
    plain = _gradients(session, images, labels, "plain", dtype)
    free()
    ours = _gradients(session, images, labels, fusion_here(session.device), dtype)
    for name, found in (("plain autocast", plain), ("fused", ours)):
        errors = {key: _error(found[key], exact[key]) for key in exact}
        parts = {key: ".".join(key.split(".")[:2]) if key.startswith("layer") else key.split(".")[0] for key in exact}
        blocks = {
            part: _error(*(_flat({key: g[key] for key in exact if parts[key] == part}) for g in (found, exact)))
            for part in dict.fromkeys(parts.values())
        }
        median = sorted(errors.values())[len(errors) // 2]
        facts = {"of_all": _error(_flat(found), _flat(exact)), "median": median, "blocks": blocks, "tensors": errors}
        session.add("gradients", f"{name}, {dtype}, against float64", **facts)


def _gradients(
    session: Session, images: Tensor, labels: Tensor, fusion: Fusion, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Of the mean loss. Branches begin small: at 0 nothing would pass them, at 1 rounding grows from block to block."""
    model = our_model(session.device, quick=session.quick, last_norm=0.2).to(images.dtype)
    set_fusion(model, fusion)
    with torch.autocast(session.device.type, dtype=dtype, enabled=dtype != torch.float64):
        logits = model(images)
    backend: Backend = "reference" if fusion == "plain" else "auto"
    return _backward(model, cross_entropy_sum(logits, labels, label_smoothing=0.1, backend=backend) / len(labels))


def _backward(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    scale = 256.0
    (loss * scale).backward()
    return {name: p.grad.double() / scale for name, p in model.named_parameters() if p.grad is not None}


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])
