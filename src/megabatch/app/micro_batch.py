"""How many samples go through one forward and backward: what suits the device, tried against the memory there is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megabatch.comm.launch import World, all_gather_objects
from megabatch.kernels.cpu import batch_norm as cpu_batch_norm
from megabatch.nn.batch_norm.evaluation_statistics import discard_step
from megabatch.nn.loss import cross_entropy_sum
from megabatch.recipe import Recipe
from megabatch.runtime import Runtime
from megabatch.train.host_memory import available_bytes
from megabatch.train.precision import Precision

MARGIN = 0.1
"""Share of the memory that a trial must leave: an evaluation, a loader's copies, and fragments come on top."""


CACHED_BYTES = 64 << 20
"""Activations of a micro-batch on a CPU, beyond which more samples a call won nothing: resnet8 on Fashion-MNIST took
9,300, 10,400, 10,900, 10,800 images/s on one core with 13, 25, 50 and 101 MiB of them; larger nets gained nothing."""


@dataclass(frozen=True)
class MicroBatch:
    """A size, and why it was chosen."""

    size: int
    reason: str


def largest_that_fits(try_size: Callable[[int], bool], *, unit: int, limit: int) -> int:
    """The largest of unit, 2 unit, 4 unit, ... and `limit` (a multiple of `unit`) that fits; 0 if not even `unit`.

    Sizes are tried from below and no further than the first that does not fit, so memory overflows once at most.
    """
    fits, size = 0, unit
    while size <= limit and try_size(size):
        fits = size
        if size == limit:
            break
        size = min(2 * size, limit)
    return fits


def fit_micro_batch(
    recipe: Recipe, runtime: Runtime, wished: int, module: nn.Module, precision: Precision, *, world: World
) -> MicroBatch:
    """The runtime's own word, or as many whole batch-norm spans as the memory holds; the same on all workers.

    On a GPU forward and backward are tried with ever larger micro-batches, up to the worker's share of a global
    batch. On a CPU `wished` (what suits its caches) is doubled while a small net's activations stay under
    `CACHED_BYTES`, where compiled kernels take several spans in one call, and made smaller where memory is short. Where
    the micro-batch is part of the arithmetic (growth by noise scale) it stays what it is.
    """
    if runtime.micro_batch_size is not None:
        return MicroBatch(wished, "as asked for")
    if recipe.max_global_batch_size:
        return MicroBatch(wished, "one span, on which the noise scale is measured")
    smallest = min([recipe.global_batch_size, *(int(size) for _, size in recipe.batch_sizes)])
    share = max(1, smallest // world.world_size // recipe.bn_span) * recipe.bn_span
    pixels = int(max(value for _, value in recipe.resolution))
    sample = torch.zeros(1, recipe.image_channels, pixels, pixels, device=world.device)
    if world.device.type == "cuda":
        found = largest_that_fits(_trial_on_gpu(module, precision, sample), unit=recipe.bn_span, limit=share)
        reason = f"by trial, {100 * MARGIN:g} % of the memory left"
    else:
        per_sample = activation_bytes(module, precision, sample)
        if runtime.fusion == "auto" and not runtime.compile and cpu_batch_norm.is_available():
            wished = _grown(wished, share, per_sample)
        found = largest_that_fits(_estimate(per_sample, world), unit=recipe.bn_span, limit=wished)
        reason = "suits the caches" if found == wished else "by the memory there is"
    agreed = min(all_gather_objects(found, world))
    return MicroBatch(agreed or recipe.bn_span, reason if agreed else "one span, though memory is short")


def _trial_on_gpu(module: nn.Module, precision: Precision, sample: Tensor) -> Callable[[int], bool]:
    def fits(size: int) -> bool:
        device = sample.device
        torch.cuda.empty_cache()  # what earlier work in this process has left is no part of the peak
        torch.cuda.reset_peak_memory_stats(device)
        overflowed = False
        try:
            with torch.random.fork_rng(devices=[device]):  # dropout must draw as if nothing had been tried
                _forward_and_backward(module, precision, sample, size)
        except torch.OutOfMemoryError:
            overflowed = True
        module.zero_grad(set_to_none=True)
        discard_step(module)
        peak = torch.cuda.max_memory_reserved(device)
        torch.cuda.empty_cache()  # blocks that were cut for one size fit another badly
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
        return not overflowed and peak + others <= (1 - MARGIN) * total

    return fits


def _forward_and_backward(module: nn.Module, precision: Precision, sample: Tensor, size: int) -> None:
    images = sample.expand(size, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(size, dtype=torch.int64, device=sample.device)
    with precision.autocast():
        logits = module(images)
    torch.autograd.backward(cross_entropy_sum(logits, labels))


def _grown(size: int, share: int, per_sample: float) -> int:
    """`size` doubled as often as a small net can use."""
    while 2 * size <= share and 2 * size * per_sample <= CACHED_BYTES:
        size *= 2
    return size


def _estimate(per_sample: float, world: World) -> Callable[[int], bool]:
    """Whether this worker's part of the host's memory holds the activations of so many samples."""
    available = available_bytes()
    if available is None:
        return lambda _: True
    room = (1 - MARGIN) * available / world.local_world_size
    return lambda size: size * per_sample <= room


def activation_bytes(module: nn.Module, precision: Precision, sample: Tensor) -> float:
    """Bytes that forward and backward of one more sample take, about: 1.5 times all layers' outputs.

    Backward needs most of them, and its own gradients come and go beside them. ResNet-50 at 224 px on a CPU, MiB:
    64 by this rule in bf16 and 58 measured, 128 and 108 in fp32.
    """
    sizes: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: sizes.append(output.nbytes))
        for layer in module.modules()
        if not list(layer.children())
    ]
    try:
        module.eval()
        with torch.inference_mode(), precision.autocast():
            module(sample)
    finally:
        module.train()
        for hook in hooks:
            hook.remove()
    return 1.5 * sum(sizes)
