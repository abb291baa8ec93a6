"""Initial state of a run, from the recipe or from a checkpoint; equal on every worker."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megabatch.app.classes import match_training_data
from megabatch.app.data import Data, build_train_loader
from megabatch.app.model import build_model, build_optimizer, make_model
from megabatch.app.run_log import RunLog
from megabatch.comm.launch import World, broadcast_from_rank0
from megabatch.errors import CheckpointError
from megabatch.nn.initialize import weights_digest
from megabatch.nn.vgg import whiten_
from megabatch.observe.run_folder import holds_run
from megabatch.optim.batch_size import NoiseScaleBatchPolicy
from megabatch.optim.ema import WeightAverage
from megabatch.recipe import Recipe, differing_fields, from_json
from megabatch.runtime import Runtime
from megabatch.train.checkpoint import CheckpointInfo, agree_on_checkpoint
from megabatch.train.health.memory_copies import copies_folder
from megabatch.train.precision import Precision
from megabatch.train.state import TrainState
from megabatch.train.weight_copies import WeightCopies

WHITENING_IMAGES = 2000
"""Training images whose patches set a whitened stem."""


def build_state(
    recipe: Recipe,
    runtime: Runtime,
    precision: Precision,
    *,
    world: World,
    micro_batch_size: int,
    capturable: bool = False,
    initial: Mapping[str, Tensor] | None = None,
    stem_weight: Tensor | None = None,
) -> TrainState:
    """Model, optimizer and policies at step 0; with `capturable`, rates are tensors that a CUDA graph reads.

    `initial` are weights to start from, by name; `stem_weight` is of `whitened_stem`.
    """
    sizes: dict[str, Any] = {"world": world, "micro_batch_size": micro_batch_size}
    module = build_model(recipe, runtime, **sizes, initial=initial, stem_weight=stem_weight)
    policy = None
    if recipe.max_global_batch_size:
        policy = NoiseScaleBatchPolicy(
            recipe.global_batch_size, unit=recipe.bn_span, max_batch_size=recipe.max_global_batch_size
        )
    average = WeightAverage(module, recipe.ema_half_life_epochs) if recipe.ema_half_life_epochs else None
    copies = _copies(runtime, precision, module)
    optimizer = build_optimizer(
        recipe,
        module,
        capturable=capturable,
        copies=copies.tensors,
        process_group=dist.group.WORLD if world.world_size > 1 else None,
        iteration_dtype=torch.bfloat16 if precision.name != "fp32" and world.device.type == "cuda" else None,
    )
    return TrainState(module, optimizer, precision, average, policy, copies=copies)


def whitened_stem(recipe: Recipe, runtime: Runtime, data: Data, *, world: World) -> Tensor | None:
    """Weight of a stem that whitens the run's first training images, equal on every worker; None for other stems."""
    if recipe.stem != "whitened":
        return None
    weight = None
    if world.is_first:
        with contextlib.closing(build_train_loader(recipe, runtime, data.train, world=world)) as loader:
            images = loader.load(range(WHITENING_IMAGES), resolution=int(recipe.resolution[-1][1])).images
        stem = cast("nn.Conv2d", make_model(recipe).stem)
        weight = whiten_(stem, images).weight.detach()
    return broadcast_from_rank0(weight, world)


def _copies(runtime: Runtime, precision: Precision, module: nn.Module) -> WeightCopies:
    """16-bit copies of the weights that forward casts; none under torch.compile, whose graphs read the weights."""
    wanted = runtime.weight_copies and precision.name != "fp32" and not runtime.compile
    return WeightCopies(module if wanted else None, precision.dtype)


def resume(
    state: TrainState,
    recipe: Recipe,
    data: Data,
    folder: Path,
    *,
    world: World,
    log: RunLog,
    with_copies: bool = False,
) -> tuple[CheckpointInfo | None, Data]:
    """Loads the newest intact checkpoint, the same one on every worker; `with_copies` also those in hosts' memory.

    Returns its description, or None if there is none, and `data` with labels numbered as in that checkpoint.
    """

    folders = [folder / "checkpoints"] + ([copies_folder(folder)] if with_copies else [])
    found = agree_on_checkpoint(folders, world, on_damaged=log.warn)
    if found is None:
        if holds_run(folder):
            log.warn("no checkpoint to resume from; the run starts at step 0")
        return None, data
    info, saved = found
    refuse_other_recipe(recipe, from_json(info.recipe))
    data, remark = match_training_data(data, info)
    if remark:
        log.warn(remark)
    state.load_state_dict(saved)
    return info, data


def refuse_other_recipe(recipe: Recipe, saved: Recipe) -> None:
    """Raises CheckpointError, which lists the differing fields, if the two recipes could train different weights."""
    differing = differing_fields(recipe, saved)
    if differing:
        listed = "; ".join(f"{name} was {old}, now {new}" for name, (new, old) in differing.items())
        raise CheckpointError(f"the checkpoint is of another recipe: {listed}; use its values, or another --output")


def check_same_weights(module: nn.Module, world: World) -> None:
    """Raises CheckpointError on a worker whose weights differ from those of rank 0."""
    digest = weights_digest(module)
    if broadcast_from_rank0(digest, world) != digest:
        raise CheckpointError(
            f"worker {world.rank} has other initial weights than worker 0; all workers need the same torch version"
        )
