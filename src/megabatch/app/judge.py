"""What is done with the weights every few epochs: an exact evaluation, and a checkpoint."""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megabatch.app.data import Data, build_eval_loader, eval_block_size
from megabatch.app.run_log import Sinks
from megabatch.comm.launch import World
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.nn.batch_norm.evaluation_statistics import begin_precise, finish_precise
from megabatch.observe.curve import against_curve, curve_text
from megabatch.recipe import Recipe, fields_as_json
from megabatch.runtime import Runtime
from megabatch.train.checkpoint import CheckpointWriter, checkpoint_path
from megabatch.train.evaluate import evaluate
from megabatch.train.schedule import settings_at
from megabatch.train.state import Evaluation, StepSettings, TrainState


def evaluator(
    recipe: Recipe,
    runtime: Runtime,
    data: Data,
    *,
    world: World,
    state: TrainState,
    sinks: Sinks,
    loader: TrainLoader,
    split: Callable[[StepSettings], list[range]],
) -> Callable[[], Evaluation]:
    """What evaluates the present weights, or their average, and reports it."""
    eval_loader = build_eval_loader(recipe, runtime, data.evaluation, world=world)

    def evaluate_now() -> Evaluation:
        started = time.perf_counter()
        with state.average.swapped() if state.average else contextlib.nullcontext():
            if recipe.eval_stats == "precise":
                _recompute_statistics(recipe, state, loader, split)
            result = evaluate(
                state.module,
                eval_loader,
                world=world,
                precision=state.precision,
                block_size=eval_block_size(recipe),
            )
        state.module.train()
        state.best_top1 = max(state.best_top1, result.top1)
        sinks.log(_evaluation_event(recipe, state, result, time.perf_counter() - started))
        return result

    return evaluate_now


def _recompute_statistics(
    recipe: Recipe, state: TrainState, loader: TrainLoader, split: Callable[[StepSettings], list[range]]
) -> None:
    """Batch-norm statistics of the present weights over the last `precise_batches` global batches."""
    wanted = recipe.precise_batches * recipe.global_batch_size
    first = max(0, state.samples_seen - wanted)
    epoch = first / recipe.num_train_images
    batch = settings_at(recipe, state.step, first)
    settings = dataclasses.replace(batch, first=first, count=state.samples_seen - first, epoch=epoch)
    begin_precise(state.module)
    for batch_of_images in loader.batches((positions, settings.resolution) for positions in split(settings)):
        with torch.no_grad(), state.precision.autocast():
            state.module(batch_of_images.images)
    finish_precise(state.module)


def _evaluation_event(recipe: Recipe, state: TrainState, result: Evaluation, seconds: float) -> dict[str, Any]:
    epoch = state.samples_seen / recipe.num_train_images
    event: dict[str, Any] = {"event": "evaluation", "step": state.step, "epoch": epoch, "top1": result.top1}
    event |= {"top5": result.top5, "loss": result.loss, "num_samples": result.num_samples, "seconds": seconds}
    place = against_curve(recipe.published_curve, epoch, result.top1)
    if place is not None:
        event |= {"against_curve": place, "remark": curve_text(recipe.published_curve, epoch, result.top1)}
    return event


def saver(
    recipe: Recipe,
    runtime: Runtime,
    folder: Path,
    *,
    world: World,
    state: TrainState,
    sinks: Sinks,
    stack: contextlib.ExitStack,
) -> Callable[[Evaluation | None], None]:
    """What writes a checkpoint, on the first worker; it is on disk when `stack` ends."""
    if not world.is_first:
        return lambda _: None
    writer = CheckpointWriter(folder / "checkpoints", fields_as_json(recipe), keep=runtime.keep_checkpoints)
    stack.callback(writer.wait)

    def save(evaluation: Evaluation | None) -> None:
        epoch = state.samples_seen / recipe.num_train_images
        top1 = evaluation.top1 if evaluation else None
        writer.write(state.state_dict(), step=state.step, epoch=epoch, top1=top1)
        sinks.log(
            {
                "event": "checkpoint",
                "step": state.step,
                "path": f"checkpoints/{checkpoint_path(folder, state.step).name}",
            }
        )

    return save
