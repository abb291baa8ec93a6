"""Jobs of `gpu.py` about whole training steps: the peer's, ours, the product's, and a profile of ours."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor

from gpu_models import Half, Step, half_step, has_torchvision, our_model, plain_step, torchvision_model
from gpu_session import Session, graph_of
from gpu_traffic import Kernel, Traffic, by_kind, fake_step
from megabatch import recipes
from megabatch.bench.timing import measure
from megabatch.cli.bench.step import Variant
from megabatch.cli.bench.step import measure as measure_variants
from megabatch.comm.launch import join
from megabatch.nn.fused.fuse import Fusion
from megabatch.recipe import override
from megabatch.runtime import Runtime

PASSES = 9
ELEMENTS = 11.1e6
"""Convolution outputs of one image at 224 px, and how often a fully fused step must move them (docs/decisions/0005)."""
BATCHES = (32, 1024)
MEMORY_SHARES = {1024: 0.55, 256: 0.2, 32: 0.06}
"""Of the GPU's memory, for the warm-ups of the peer beside one another and beside the tests."""
WAYS: tuple[Fusion, ...] = ("auto", "plain")


def batch(session: Session, count: int) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    pixels = 32 if session.quick else 224
    images = session.images(count, 3, pixels, torch.float32)
    labels = torch.randint(1000, (count,), device=session.device, generator=torch.Generator(session.device))
    return images, labels


def peer(session: Session, size: str) -> None:
    """torchvision's ResNet-50, or ours plain without torchvision, by torch.compile: warms up, waits, is measured."""
    count = 2 if session.quick else int(size)
    make, name = (torchvision_model, "torchvision") if has_torchvision() else (our_model, "ours plain")
    compiler = "inductor" if session.is_cuda else "eager"  # compiling for a CPU takes minutes and says nothing here
    model, data = make(session.device, quick=session.quick), batch(session, count)
    step = plain_step(model, *data, session.dtype, compiler=compiler)
    if session.is_cuda:
        torch.cuda.set_per_process_memory_fraction(MEMORY_SHARES[int(size)])
    with contextlib.suppress(torch.OutOfMemoryError):  # compiled all the same; alone it has all memory
        for _ in range(2):
            step()
    if session.is_cuda:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
    session.wait_for_go()
    case = f"{name} compiled, {session.dtype}, batch {size}"
    session.guarded(case, functools.partial(_timed, session, case, int(size), count, step, eager=True))


def ours(session: Session, dtype: str, size: str) -> None:
    """Our step by each of `WAYS`, as one CUDA graph."""
    count, type_here = 2 if session.quick else int(size), getattr(torch, dtype) if session.is_cuda else torch.bfloat16
    for fusion in WAYS:
        case = f"ours {fusion}, {dtype}, batch {size}"

        def run(case: str = case, fusion: Fusion = fusion) -> None:
            _timed(session, case, int(size), count, our_step(session, count, fusion, type_here))

        session.guarded(case, run)


def our_step(session: Session, count: int, fusion: Fusion, dtype: torch.dtype) -> Step:
    """Weights in 16 bit, the fused loss and LARS."""
    half = Half(our_model(session.device, quick=session.quick), dtype, fusion)
    images, labels = batch(session, count)
    return half_step(half, images.to(dtype), labels)


def _timed(session: Session, case: str, size: int, count: int, step: Step, *, eager: bool = False) -> None:
    """The step of `count` images as one CUDA graph; on a CPU, and with `eager` also on a GPU, as it is."""
    if eager or not session.is_cuda:
        _add(session, case, size, count, step)
    if session.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        _add(session, f"{case}, one graph" if eager else case, size, count, graph_of(step))


def _add(session: Session, case: str, size: int, count: int, work: Step) -> None:
    queued = 1 if session.is_cuda else 0
    timing = measure(work, warmup=0 if session.quick else 5, repeats=1 if session.quick else 15, queued=queued)
    rate = count / timing.median_s
    facts: dict[str, Any] = {"batch": size, "images_per_s": rate}
    if session.is_cuda:
        facts["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if "copy_bytes_per_s" in session.ceilings and not session.quick:
        facts["of_fused_floor"] = rate * PASSES * ELEMENTS * 2 / session.ceilings["copy_bytes_per_s"]
    session.add(case, timing, **facts)


def compile_kernels(session: Session, dtype: str) -> None:
    """Compiles, on one core, each kernel that a step of ours launches, for the cache on disk."""
    from gpu_instructions import compiled

    for count in (2,) if session.quick else (1024, 32, 256):
        case = f"kernels, {dtype}, batch {count}"

        def run(case: str = case, count: int = count) -> None:
            pixels = 32 if session.quick else 224
            step = functools.partial(fake_step, count, pixels, dtype=getattr(torch, dtype))
            session.add(case, compiled=len(compiled(step)))

        session.guarded(case, run)


def product(session: Session) -> None:
    """The step of `megabatch train`, as `megabatch bench step` runs it, in both 16-bit types."""
    with join(device=session.device.type) as world:
        for size in BATCHES:
            for precision in ("fp16", "bf16") if session.is_cuda else ("bf16",):
                case = f"megabatch bench step, {precision}, batch {size}"
                session.guarded(case, functools.partial(_product, session, case, size, precision, world))


def _product(session: Session, case: str, size: int, precision: Any, world: Any) -> None:
    count = 4 if session.quick else size
    small = {"model": "resnet18", "resolution": "0:32"} if session.quick else {}
    recipe = override(recipes.get("goyal2017_8k"), {"bn_span": str(count), "global_batch_size": str(count), **small})
    variant = Variant(case, Runtime(precision=precision), "")
    (row,) = measure_variants(recipe, count, [variant], world, seconds=0.1 if session.quick else 4.0)
    if row.timing is None:
        raise RuntimeError(row.error)
    session.add(case, row.timing, batch=size, images_per_s=count / row.median_s)


def profile(session: Session) -> None:
    """Our step by kernel: calls, time, bytes, share of the copy rate, gaps."""
    for size in reversed(BATCHES):
        case = f"batch {size}"
        session.guarded(case, functools.partial(_profile, session, case, 2 if session.quick else size))


def _profile(session: Session, case: str, count: int) -> None:
    step = our_step(session, count, "auto", session.dtype)
    for _ in range(3 if session.is_cuda else 1):
        step()
    with Traffic() as traffic:
        step()
    moved = traffic.total().bytes
    session.add(f"{case}, all that the step moves", bytes=moved, bytes_per_image=moved / count)
    if not session.is_cuda:
        return
    kernels, gaps_s, total_s = _kernel_times(graph_of(step))
    session.add(f"{case}, gaps between kernels", calls=1, total_ms=1e3 * gaps_s, share=gaps_s / total_s)
    for kind, kernel in sorted(by_kind(kernels).items(), key=lambda item: -item[1].seconds):
        _add_kind(session, traffic, f"{case}, {kind}", kind, kernel, total_s)
    for name, kernel in sorted(kernels.items(), key=lambda item: -item[1].seconds)[:25]:
        session.add(f"{case}, kernel {name[:80]}", calls=kernel.calls, total_ms=1e3 * kernel.seconds)


def _kernel_times(step: Step) -> tuple[dict[str, Kernel], float, float]:
    """Calls and seconds of each GPU kernel of one step, seconds without any kernel, and seconds in all."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    rows = [row for row in trace.key_averages() if row.device_time_total]
    kernels = {row.key: Kernel(row.count, row.device_time_total / 1e6) for row in rows}
    ranges = [event.time_range for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    total_s = (max(r.end for r in ranges) - min(r.start for r in ranges)) / 1e6
    return kernels, total_s - sum(kernel.seconds for kernel in kernels.values()), total_s


def _add_kind(session: Session, traffic: Traffic, case: str, kind: str, kernel: Kernel, total_s: float) -> None:
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
    session.add(case, **facts)
