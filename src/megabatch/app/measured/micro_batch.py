"""Choice of the micro-batch size for the device, by a trial against the available memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megabatch.comm.launch import World, all_gather_objects
from megabatch.host_memory import available_bytes
from megabatch.kernels.cpu import batch_norm as cpu_batch_norm
from megabatch.nn.batch_norm.evaluation_statistics import discard_step
from megabatch.nn.loss import cross_entropy_sum
from megabatch.recipe import Recipe
from megabatch.runtime import Runtime
from megabatch.train.precision import Precision

MARGIN = 0.1
"""Fraction of memory that a trial leaves free for evaluation, loader buffers and fragmentation."""

CACHED_BYTES = 64 << 20
"""Activation size of a micro-batch on a CPU beyond which larger micro-batches are no faster: resnet8 on Fashion-MNIST
ran at 9,300, 10,400, 10,900, 10,800 images/s on one core with 13, 25, 50 and 101 MiB; larger nets gained nothing."""


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch size and the reason for it."""

    size: int
    reason: str


def largest_that_fits(try_size: Callable[[int], bool], *, unit: int, limit: int) -> int:
    """Returns the largest of unit, 2 unit, 4 unit, ... and `limit` (a multiple of `unit`) that fits; 0 if none does.

    Sizes are tried in ascending order up to the first that does not fit, so memory overflows at most once.
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
    """The runtime's micro-batch size, or as many batch-norm spans as fit in memory; the same on all workers.

    On a GPU forward and backward are tried with growing micro-batches, up to the worker's share of a global batch. On a
    CPU `wished` (sized for the caches) is doubled while the activations of a small net stay under `CACHED_BYTES`, if
    compiled kernels process several spans per call, and reduced if memory is short. Under growth by noise scale the
    micro-batch is part of the arithmetic and does not change.
    """
    if runtime.micro_batch_size is not None:
        return MicroBatch(wished, "as given")
    if recipe.max_global_batch_size:
        return MicroBatch(wished, "one span, on which the noise scale is measured")
    share = max(1, recipe.smallest_batch // world.world_size // recipe.bn_span) * recipe.bn_span
    pixels = int(max(value for _, value in recipe.resolution))
    # Not blank: on a GPU the first kernels are compared with torch's operations here.
    values = torch.linspace(-1, 1, recipe.image_channels * pixels**2, device=world.device)
    sample = values.view(1, recipe.image_channels, pixels, pixels)
    if world.device.type == "cuda":
        found = largest_that_fits(_trial_on_gpu(module, precision, sample), unit=recipe.bn_span, limit=share)
        reason = f"found by trial, {100 * MARGIN:g} % of memory left free"
    else:
        per_sample = activation_bytes(module, precision, sample)
        if runtime.fusion == "auto" and not runtime.compile and cpu_batch_norm.is_available():
            wished = _grown(wished, share, per_sample)
        found = largest_that_fits(_estimate(per_sample, world), unit=recipe.bn_span, limit=wished)
        reason = "suits the caches" if found == wished else "limited by memory"
    agreed = min(all_gather_objects(found, world))
    return MicroBatch(agreed or recipe.bn_span, reason if agreed else "one span, which memory may be too small for")


def _trial_on_gpu(module: nn.Module, precision: Precision, sample: Tensor) -> Callable[[int], bool]:
    def fits(size: int) -> bool:
        device = sample.device
        torch.cuda.empty_cache()  # cached blocks of earlier work do not count towards the peak
        torch.cuda.reset_peak_memory_stats(device)
        overflowed = False
        try:
            with torch.random.fork_rng(devices=[device]):  # the trial must not advance dropout's generator
                _forward_and_backward(module, precision, sample, size)
        except torch.OutOfMemoryError:
            overflowed = True
        module.zero_grad(set_to_none=True)
        discard_step(module)
        peak = torch.cuda.max_memory_reserved(device)
        torch.cuda.empty_cache()  # blocks cached for one size fit another badly
        free, total = torch.cuda.mem_get_info(device)
        other_processes = total - free - torch.cuda.memory_reserved(device)
        return not overflowed and peak + other_processes <= (1 - MARGIN) * total

    return fits


def _forward_and_backward(module: nn.Module, precision: Precision, sample: Tensor, size: int) -> None:
    images = sample.expand(size, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(size, dtype=torch.int64, device=sample.device)
    with precision.autocast():
        logits = module(images)
    torch.autograd.backward(cross_entropy_sum(logits, labels))


def _grown(size: int, share: int, per_sample: float) -> int:
    """`size`, doubled while the activations of a micro-batch stay under `CACHED_BYTES`."""
    while 2 * size <= share and 2 * size * per_sample <= CACHED_BYTES:
        size *= 2
    return size


def _estimate(per_sample: float, world: World) -> Callable[[int], bool]:
    """Returns a function that is True if this worker's share of host memory holds the activations of `size` samples."""
    available = available_bytes()
    if available is None:
        return lambda _: True
    room = (1 - MARGIN) * available / world.local_world_size
    return lambda size: size * per_sample <= room


def activation_bytes(module: nn.Module, precision: Precision, sample: Tensor) -> float:
    """Approximate memory per sample of forward and backward: 1.5 times the outputs of all layers, in bytes.

    Backward reads most of them, and allocates gradients besides. ResNet-50 at 224 px on a CPU: 64 MiB by this rule in
    bf16 and 58 MiB measured, 128 and 108 MiB in fp32.
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
