"""Resolves what the runtime leaves open (micro-batch, workers, precision) and checks that recipe and runtime fit."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megabatch.app.model import unsafe_convolution
from megabatch.comm.launch import World, has_apple_gpu
from megabatch.cores import usable_cores
from megabatch.data.loading.split import check_split
from megabatch.errors import SettingsError
from megabatch.host_memory import keep_freed_memory
from megabatch.kernels.cpu import batch_norm as cpu_batch_norm
from megabatch.kernels.cpu import conv as cpu_conv
from megabatch.kernels.dispatch import has_triton
from megabatch.model_names import is_own
from megabatch.recipe import Recipe
from megabatch.recipe_validation import validate
from megabatch.runtime import Runtime
from megabatch.train.precision import LARGEST_SCALE, Precision, fastest_precision


def choose_micro_batch(recipe: Recipe, runtime: Runtime, *, world_size: int, device: torch.device) -> int:
    """Samples per forward and backward: the runtime's value, or a default for the device.

    The default is a multiple of the batch-norm span and, where possible, independent of the number of workers, so that
    every world size computes the same micro-batches bit for bit.
    """
    if runtime.micro_batch_size is not None:
        return runtime.micro_batch_size
    if recipe.max_global_batch_size:
        return recipe.bn_span  # the noise scale is measured between one span and the global batch
    pixels = max(value for _, value in recipe.resolution)
    # On a CPU activations should stay near the caches: 256 samples of 32 px, 36 of 224. A GPU needs large batches.
    budget = 256 * 32 / pixels if device.type == "cpu" else 256 * (224 / pixels) ** 2
    # A micro-batch of one span is normalised in one call; several spans only where one is too little work.
    spans = 1 if recipe.bn_span >= budget / 4 else int(budget // recipe.bn_span)
    return recipe.bn_span * min(spans, max(1, recipe.global_batch_size // world_size // recipe.bn_span))


def check(recipe: Recipe, runtime: Runtime, *, world_size: int, device: torch.device) -> int:
    """Returns the micro-batch size; raises RecipeError or SettingsError if recipe and runtime do not fit."""
    validate(recipe)
    choose_precision(runtime, device)
    choose_capture(recipe, runtime, World(world_size=world_size, device=device))
    if device.type == "cpu" and runtime.channels_last and (unsafe := unsafe_convolution(recipe, runtime.model)):
        width = f" with width={recipe.width}" if is_own(recipe.model) else ""
        raise SettingsError(
            f"{recipe.model}{width}: PyTorch's backward of {unsafe}, can corrupt memory in channels_last on a CPU; "
            f"--no-channels-last or no such option{', or --set width=8,' if width else ''} works"
        )
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
    """Default number of local workers: one per GPU, else one per core (max 8), at most one per batch-norm span."""
    if has_apple_gpu(runtime.device):
        return 1
    gpus = torch.cuda.device_count() if runtime.device != "cpu" and torch.cuda.is_available() else 0
    return max(1, min(gpus or min(usable_cores(), 8), recipe.smallest_batch // recipe.bn_span))


def choose_precision(runtime: Runtime, device: torch.device) -> Precision:
    """The runtime's precision, or the fastest of the device, with the runtime's loss scale.

    Raises:
        SettingsError: the loss scale is not a power of two in fp16's range.
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
    """True in `chosen` if steps are captured in CUDA graphs, and the reason."""

    chosen: bool
    reason: str


def choose_capture(recipe: Recipe, runtime: Runtime, world: World) -> Capture:
    """Captures under `auto` on one CUDA device; impossible elsewhere, and where a step reads its own results.

    Several workers are captured, with their collectives, under `on` alone: no GPU has run that yet.

    Raises:
        SettingsError: capture=on where capture is impossible.
    """
    obstacle = None
    if world.device.type != "cuda":
        obstacle = "there is no GPU"
    elif world.world_size > 1 and recipe.optimizer == "muon":
        obstacle = "Muon divides its iterations among workers"
    elif world.world_size > 1 and _shares_spans(recipe, runtime, world):
        obstacle = "workers share batch-norm spans"
    elif world.world_size > 1 and runtime.capture == "auto":
        obstacle = "several workers are captured with --capture on alone" + _cost_of_launches(recipe, world)
    elif recipe.optimizer == "shampoo":
        obstacle = "Shampoo computes roots every few steps"
    elif recipe.max_global_batch_size:
        obstacle = "growth by noise scale reads each micro-batch's gradient"
    elif recipe.on_non_finite != "stop":
        obstacle = f"on_non_finite={recipe.on_non_finite} reads each step's loss before the update"
    if runtime.capture == "on" and obstacle:
        raise SettingsError(f"capture=on: a step cannot be one CUDA graph, as {obstacle}; capture=auto works")
    if runtime.capture == "off" or obstacle:
        return Capture(False, f"steps not captured ({obstacle or 'capture=off'})")
    return Capture(True, "steps captured in a CUDA graph")


def _shares_spans(recipe: Recipe, runtime: Runtime, world: World) -> bool:
    """True if a batch-norm span is divided among workers."""
    size = choose_micro_batch(recipe, runtime, world_size=world.world_size, device=world.device)
    return size < recipe.bn_span


LAUNCHES_S = 0.03
"""Estimated host time of launching ResNet-50's forward and backward without a graph; not measured on a GPU yet."""
_IMAGES_PER_S = 7500


def _cost_of_launches(recipe: Recipe, world: World) -> str:
    """A remark where a worker's share of a step is so small that its GPU would wait for launches, else nothing."""
    share, hidden = recipe.smallest_batch // world.world_size, int(LAUNCHES_S * _IMAGES_PER_S)
    if share >= hidden:
        return ""
    return f"; launching them takes about {1e3 * LAUNCHES_S:g} ms, which {hidden} images a GPU hide and {share} do not"


def choose_memory(runtime: Runtime, world: World) -> str:
    """Keeps freed memory in a worker on a CPU, unless the runtime forbids it; returns a description of the setting.

    Measured on two cores with ResNet-50 in bf16: 1.3 times as fast, for 1.15 times the memory.
    """
    kept = runtime.keep_memory and world.device.type == "cpu" and keep_freed_memory(world.local_world_size)
    return kept or "freed memory is returned to the system"


@contextlib.contextmanager
def cudnn_measures(runtime: Runtime, device: torch.device) -> Iterator[None]:
    """Within the block cuDNN benchmarks its algorithms at each new shape, if the runtime allows it."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = runtime.cudnn_benchmark and device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def describe_kernels(runtime: Runtime, precision: Precision, device: torch.device, *, fusible: bool = True) -> str:
    """Describes which kernel implementation is used for a model that has `fusible` blocks or none."""
    layout = "NCHW" if runtime.channels_last is False else "channels_last"
    if runtime.compile:
        return f"torch.compile kernels in {layout}"
    if not fusible:
        return f"torch kernels in {layout}"
    if device.type == "cuda" and runtime.fusion != "plain":
        return "fused kernels" if has_triton() else "torch kernels (Triton is not installed)"
    if device.type == "mps":
        return f"torch kernels in {layout}"
    if device.type == "cpu" and not cpu_batch_norm.is_available():
        return f"torch kernels in {layout} (compiling ours needs a C compiler, on Linux)"
    if runtime.fusion == "plain" or layout == "NCHW":
        return f"torch kernels in {layout}"
    convolutions = cpu_conv.is_available(precision.dtype)
    return "fused batch norm and convolutions" if convolutions else "fused batch norm"
