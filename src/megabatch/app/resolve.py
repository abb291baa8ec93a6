"""What the runtime leaves open: micro-batch, workers, precision; and whether recipe and runtime fit together."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megabatch.comm.launch import World, available_cores
from megabatch.data.loading.split import check_split
from megabatch.errors import SettingsError
from megabatch.kernels.cpu import batch_norm as cpu_batch_norm
from megabatch.kernels.cpu import conv as cpu_conv
from megabatch.kernels.dispatch import has_triton
from megabatch.recipe import Recipe, validate
from megabatch.runtime import Runtime
from megabatch.train.host_memory import keep_freed_memory
from megabatch.train.precision import LARGEST_SCALE, Precision, fastest_precision


def choose_micro_batch(recipe: Recipe, runtime: Runtime, *, world_size: int, device: torch.device) -> int:
    """Samples of one forward and backward: the runtime's word, or what suits the device.

    Chosen as whole batch-norm spans, and without regard to the number of workers where that is possible, so that the
    same micro-batches are computed (bit for bit) whatever the world size.
    """
    if runtime.micro_batch_size is not None:
        return runtime.micro_batch_size
    if recipe.max_global_batch_size:
        return recipe.bn_span  # the noise scale is measured between one span and the global batch
    pixels = max(value for _, value in recipe.resolution)
    # A CPU wants its activations near the caches: 256 samples of 32 px, 36 of 224; a GPU wants to be filled.
    budget = 256 * (224 / pixels) ** 2 if device.type == "cuda" else 256 * 32 / pixels
    # One span a micro-batch is normalised in one call; several only where one is too little work.
    spans = 1 if recipe.bn_span >= budget / 4 else int(budget // recipe.bn_span)
    return recipe.bn_span * min(spans, max(1, recipe.global_batch_size // world_size // recipe.bn_span))


def check(recipe: Recipe, runtime: Runtime, *, world_size: int, device: torch.device) -> int:
    """The micro-batch size; RecipeError or SettingsError if recipe and runtime do not fit together."""
    validate(recipe)
    choose_precision(runtime, device)
    choose_capture(recipe, runtime, World(world_size=world_size, device=device))
    micro_batch_size = choose_micro_batch(recipe, runtime, world_size=world_size, device=device)
    if recipe.max_global_batch_size and micro_batch_size != recipe.bn_span:
        raise SettingsError(
            f"micro_batch_size={micro_batch_size} contradicts max_global_batch_size: the noise scale is measured on "
            f"one batch-norm span; micro_batch_size={recipe.bn_span} works"
        )
    for _, size in recipe.batch_sizes or ((0.0, recipe.global_batch_size),):
        check_split(
            global_batch_size=int(size),
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            bn_span=recipe.bn_span,
        )
    return micro_batch_size


def default_workers(recipe: Recipe, runtime: Runtime) -> int:
    """Local workers where the user names no number: one a GPU, else one a core up to eight, none without a span."""
    gpus = torch.cuda.device_count() if runtime.device != "cpu" and torch.cuda.is_available() else 0
    smallest = min([recipe.global_batch_size, *(int(size) for _, size in recipe.batch_sizes)])
    return max(1, min(gpus or min(available_cores(), 8), smallest // recipe.bn_span))


def choose_precision(runtime: Runtime, device: torch.device) -> Precision:
    """The precision the runtime names, or the device's fastest, with the runtime's loss scale.

    Raises:
        SettingsError: a loss scale that is no power of two in fp16's range.
    """
    scale = runtime.loss_scale
    if scale is not None and (math.frexp(scale)[0] != 0.5 or not 1 <= scale <= LARGEST_SCALE):
        raise SettingsError(
            f"loss_scale={scale:g}: needed a power of two from 1 to 2^24, so that nothing is rounded; 1024"
        )
    return Precision(
        fastest_precision(device) if runtime.precision == "auto" else runtime.precision, device, loss_scale=scale
    )


@dataclass(frozen=True)
class Capture:
    """Whether steps become CUDA graphs, and why (not)."""

    chosen: bool
    words: str


def choose_capture(recipe: Recipe, runtime: Runtime, world: World) -> Capture:
    """`auto` captures on one CUDA device. Elsewhere, and where a step must look at its own results, it cannot be.

    Raises:
        SettingsError: capture=on where it cannot be.
    """
    obstacle = None
    if world.device.type != "cuda":
        obstacle = "there is no GPU"
    elif world.world_size > 1:
        obstacle = "several workers exchange gradients through hooks in Python"
    elif recipe.max_global_batch_size:
        obstacle = "growth by noise scale looks at each micro-batch's gradient"
    if runtime.capture == "on" and obstacle:
        raise SettingsError(f"capture=on: a step cannot be one CUDA graph, as {obstacle}; capture=auto works")
    if runtime.capture == "off" or obstacle:
        return Capture(False, f"steps not captured ({obstacle or 'as asked for'})")
    return Capture(True, "steps captured in a CUDA graph")


def choose_memory(runtime: Runtime, world: World) -> str:
    """Lets a worker on a CPU keep the memory it frees, unless the runtime forbids it; what was done, in words.

    Measured on two cores with ResNet-50 in bf16: 1.3 times as fast, for 1.15 times the memory.
    """
    kept = runtime.keep_memory and world.device.type == "cpu" and keep_freed_memory(world.local_world_size)
    return kept or "freed memory goes back to the system"


@contextlib.contextmanager
def cudnn_measures(runtime: Runtime, device: torch.device) -> Iterator[None]:
    """Within the block cuDNN tries its algorithms at each new shape, where the runtime lets it."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = runtime.cudnn_benchmark and device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def kernels_in_words(runtime: Runtime, precision: Precision, device: torch.device) -> str:
    """Whose kernels compute the model."""
    if runtime.compile or runtime.fusion == "plain":
        return "kernels of torch.compile" if runtime.compile else "kernels of torch"
    if device.type == "cuda":
        return "fused kernels" if has_triton() else "kernels of torch (Triton is not installed)"
    if not cpu_batch_norm.is_available():
        return "kernels of torch (ours are not compiled: that takes a C compiler, on Linux)"
    convolutions = precision.name == "bf16" and cpu_conv.is_available()
    return "fused batch norm and convolutions" if convolutions else "fused batch norm"
