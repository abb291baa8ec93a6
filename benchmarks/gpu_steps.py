"""Sections of `gpu.py` about whole training steps: their speed, their kernels, and their gradients."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpu_models import Fused, Step, fused_step, has_torchvision, our_model, plain_step, torchvision_model
from gpu_session import Session, free, graph_of, guarded
from harness import measure
from megabatch.kernels import fused_cross_entropy_sum
from megabatch.nn import cross_entropy_sum

BATCHES = (1024, 32, 256, 64, 16)
COMPILE_S, EAGER_S = 75.0, 15.0
"""Seconds that a case may take at most; with less left it is skipped."""
PASSES = 9
ELEMENTS = 11.1e6
"""Convolution outputs of one image at 224 px, and how often a fully fused step must move them (docs/decisions/0005)."""


def batch(session: Session, count: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Random images and labels; a fourth channel is 0."""
    pixels = 32 if session.quick else 224
    images = session.images(count, 3, pixels, torch.float32)
    images = functional.pad(images, (0, 0, 0, 0, 0, channels - 3)).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (count,), device=session.device, generator=torch.Generator(session.device))
    return images, labels


def step_speed(session: Session) -> None:
    """Images a second for each way of taking a step, the largest batch first, and what is compiled last: it is slow."""
    for compiled in (False, True):
        for count in (2,) if session.quick else BATCHES:
            for name, make in _ways(session, count, compiled=compiled):
                case = f"{name}, batch {count}"
                seconds = 0.0 if session.quick else COMPILE_S if compiled else EAGER_S
                if session.has_time_for("step", case, seconds):
                    guarded(session, "step", case, lambda c=case, n=count, m=make: _timed(session, c, n, m))


def _ways(session: Session, count: int, *, compiled: bool) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Name and maker of each step."""
    dtype = torch.float16 if session.is_cuda else torch.bfloat16
    if compiled and not session.is_cuda:
        return  # minutes of compiling on a CPU tell nothing about a GPU

    def fused() -> Step:
        own = Fused(our_model(session.device, quick=session.quick), span=count, dtype=dtype)
        images, labels = batch(session, count, channels=4)
        return fused_step(own, images.to(dtype), labels)

    def plain(model: Callable[..., nn.Module]) -> Step:
        own = model(session.device, quick=session.quick)
        return plain_step(own, *batch(session, count), dtype, compiled=compiled)

    kind = "compiled" if compiled else "eager"
    if not compiled:
        yield "ours fused", fused
    if has_torchvision():
        yield f"torchvision {kind}", lambda: plain(torchvision_model)
    yield f"ours {kind}", lambda: plain(our_model)


def _timed(session: Session, case: str, count: int, make: Callable[[], Step]) -> None:
    """The step as it is and, on a GPU, as one CUDA graph."""
    if session.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    step = make()
    _add(session, case, count, step)
    if session.is_cuda:
        guarded(
            session, "step", f"{case}, one graph", lambda: _add(session, f"{case}, one graph", count, graph_of(step))
        )


def _add(session: Session, case: str, count: int, work: Step) -> None:
    timing = measure(work, warmup=1 if session.quick else 5, repeats=2 if session.quick else 15)
    rate = count / timing.median_s
    facts: dict[str, Any] = {"batch": count, "images_per_s": rate}
    if session.is_cuda:
        facts["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if "copy_bytes_per_s" in session.ceilings and not session.quick:
        facts["of_fused_floor"] = rate * PASSES * ELEMENTS * 2 / session.ceilings["copy_bytes_per_s"]
    session.add("step", case, timing, **facts)


def profile(session: Session) -> None:
    """Which kernels the fused step spends its time in."""
    if not session.is_cuda:
        session.add("profile", "kernels of the fused step", skipped="needs a GPU")
        return
    own = Fused(our_model(session.device, quick=session.quick), span=1024, dtype=torch.float16)
    count = 8 if session.quick else 1024
    images, labels = batch(session, count, channels=4)
    step = fused_step(own, images.half(), labels)
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    rows = sorted(trace.key_averages(), key=lambda row: -row.device_time_total)
    total = sum(row.device_time_total for row in rows)
    for row in rows[:40]:
        share = row.device_time_total / total
        session.add("profile", row.key[:90], calls=row.count, total_ms=row.device_time_total / 1e3, share=share)


def gradients(session: Session) -> None:
    """Relative error of every gradient against float64: the fused step's and plain autocast's, on the same inputs."""
    dtype = torch.float16 if session.is_cuda else torch.bfloat16
    count, pixels = (4, 64) if session.quick else (16, 128)
    images = session.images(count, 3, pixels, torch.float32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(count, device=session.device)
    exact = _gradients_in_float64(session, images, labels)
    plain = _gradients_under_autocast(session, images, labels, dtype)
    free()
    ours = _gradients_of_fused(session, images, labels, dtype)
    for name, found in (("plain autocast", plain), ("fused", ours)):
        errors = {key: _error(found[key], exact[key]) for key in exact}
        whole = _error(torch.cat([g.flatten().double() for g in found.values()]), _flat(exact))
        worst = sorted(errors, key=lambda key: -errors[key])[:5]
        median = sorted(errors.values())[len(errors) // 2]
        facts = {"of_all": whole, "median": median, "worst": {key: errors[key] for key in worst}}
        session.add("gradients", f"{name}, {dtype}, against float64", **facts)


def _model(session: Session) -> nn.Module:
    """Without a branch that starts at 0, behind which every gradient would be 0."""
    return our_model(session.device, quick=session.quick, zero_gamma=False)


def _gradients_in_float64(session: Session, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model = _model(session).double()
    return _backward(model, cross_entropy_sum(model(images.double()), labels, label_smoothing=0.1) / len(labels))


def _gradients_under_autocast(
    session: Session, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    model = _model(session)
    with torch.autocast(session.device.type, dtype=dtype):
        logits = model(images)
    return _backward(model, cross_entropy_sum(logits, labels, label_smoothing=0.1) / len(labels))


def _gradients_of_fused(session: Session, images: Tensor, labels: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    own = Fused(_model(session), span=len(labels), dtype=dtype)
    padded = functional.pad(images, (0, 0, 0, 0, 0, 1)).contiguous(memory_format=torch.channels_last)
    logits = own.model(padded.to(dtype))
    return _backward(own.model, fused_cross_entropy_sum(logits, labels, label_smoothing=0.1) / len(labels))


def _backward(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    scale = 256.0
    (loss * scale).backward()
    return {name: p.grad.double() / scale for name, p in model.named_parameters() if p.grad is not None}


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def fastest(session: Session) -> list[str]:
    """The table's first lines: each batch's ways, fastest first."""
    lines = []
    steps = [r for r in session.results if r["section"] == "step" and "images_per_s" in r]
    for count in sorted({r["batch"] for r in steps}):
        ranked = sorted((r for r in steps if r["batch"] == count), key=lambda r: -r["images_per_s"])
        lines += [f"{r['case']:<48} {r['images_per_s']:10,.0f} images/s" for r in ranked]
    return lines
