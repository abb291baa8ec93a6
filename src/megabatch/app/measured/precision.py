"""Choice of a run's precision: on a GPU bf16 or fp16, whichever is faster for the model, by measurement."""

import dataclasses

import torch

from megabatch.app.measured import tuning
from megabatch.app.measured.trial import GradientTrial, is_wanted, largest_resolution, timed
from megabatch.app.resolve import choose_precision
from megabatch.comm.launch import World, broadcast_from_rank0
from megabatch.recipe import Recipe
from megabatch.runtime import Precision as PrecisionName
from megabatch.runtime import Runtime
from megabatch.train.precision import Precision


def measured_precision(recipe: Recipe, runtime: Runtime, *, world: World, micro_batch_size: int) -> Precision:
    """As `choose_precision`, but `auto` on a GPU with bf16 is bf16 or fp16, whichever computes gradients faster.

    Rank 0 times forward, backward and the loss scale's pass on one micro-batch; the choice is kept in a
    table (`app/measured/tuning.py`). Under torch.compile, which would take minutes, and with MEGABATCH_MEASURE=0 in the
    environment `auto` stays bf16.
    """
    usual = choose_precision(runtime, world.device)
    is_open = runtime.precision == "auto" and usual.name == "bf16" and world.device.type == "cuda"
    if not is_open or runtime.compile or not is_wanted():
        return usual
    name: PrecisionName = _faster(recipe, runtime, world.device, micro_batch_size) if world.is_first else "bf16"
    return choose_precision(dataclasses.replace(runtime, precision=broadcast_from_rank0(name, world)), world.device)


def _faster(recipe: Recipe, runtime: Runtime, device: torch.device, size: int) -> PrecisionName:
    layout = "contiguous" if runtime.channels_last is False else "channels_last"
    task = f"precision of {recipe.model}, {runtime.fusion}, {layout}"
    sizes = (size, recipe.bn_span, largest_resolution(recipe), recipe.num_classes, recipe.width)
    trials = {
        name: GradientTrial(recipe, runtime, Precision(precision, device), device, size)
        for name, precision in ((tuning.PLAIN, "bf16"), ("fp16", "fp16"))
    }
    table = tuning.table().beside(timed(tuning.gpu_seconds))
    fastest = table.choose(task, sizes, torch.empty(0, device=device), trials)
    return "bf16" if fastest == tuning.PLAIN else "fp16"
