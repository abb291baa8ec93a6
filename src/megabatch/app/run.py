"""Wiring of one run: everything the loop calls, put together and taken down again."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from megabatch.app.data import Data, build_train_loader
from megabatch.app.exchange import build_exchange
from megabatch.app.judge import evaluator, saver
from megabatch.app.micro_batch import fit_micro_batch
from megabatch.app.model import apply_settings, build_model
from megabatch.app.resolve import (
    check,
    choose_capture,
    choose_memory,
    choose_precision,
    cudnn_measures,
    kernels_in_words,
)
from megabatch.app.run_log import Sinks, announce_measuring, describe_run, open_sinks
from megabatch.app.state import build_state, check_same_weights, resume
from megabatch.comm.launch import World
from megabatch.data.loading.split import micro_batches
from megabatch.nn.batch_norm.evaluation_statistics import discard_step, finish_step
from megabatch.optim.ema import WeightAverage
from megabatch.recipe import Recipe
from megabatch.runtime import Runtime
from megabatch.train.cuda_graph import CapturedStep
from megabatch.train.schedule import settings_at, total_samples
from megabatch.train.state import Run, StepSettings
from megabatch.train.step import captured_work


@contextlib.contextmanager
def open_run(
    recipe: Recipe,
    runtime: Runtime,
    data: Data,
    *,
    world: World,
    folder: Path,
    stop_requested: Callable[[], bool],
    max_steps: int | None = None,
    quiet: bool = False,
) -> Iterator[Run]:
    """Everything the loop needs, on this worker; closes files, threads and the exchange at the end.

    Raises:
        RecipeError, SettingsError: recipe and runtime do not fit together.
        CheckpointError: `runtime.resume` and the folder's run is another recipe's.
    """
    wished = check(recipe, runtime, world_size=world.world_size, device=world.device)
    precision = choose_precision(runtime, world.device)
    captures = choose_capture(recipe, runtime, world)
    memory = choose_memory(runtime, world)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cudnn_measures(runtime, world.device))
        sinks = open_sinks(recipe, folder, world=world, quiet=quiet, stack=stack)
        state = build_state(
            recipe, runtime, precision, world=world, micro_batch_size=wished, capturable=captures.chosen
        )
        resumed_from = resume(state, recipe, folder, world=world, sinks=sinks) if runtime.resume else None
        check_same_weights(state.module, world)
        announce_measuring(sinks, stack)
        micro_batch = fit_micro_batch(recipe, runtime, wished, state.module, state.precision, world=world)
        model, report = build_exchange(recipe, state, runtime, folder, world=world, stack=stack)
        if world.is_first:
            kernels = kernels_in_words(runtime, precision, world.device)
            choices = (f"micro-batch {micro_batch.reason}", kernels, memory, captures.words)
            describe_run(sinks, recipe, runtime, data, world, micro_batch.size, choices, state, resumed_from)
        loader = build_train_loader(recipe, runtime, data.train, world=world, on_bad_sample=_warn_of(sinks))
        stack.callback(loader.close)
        split = _split(recipe, world, micro_batch.size)
        run = Run(
            world=world,
            state=state,
            model=model,
            loader=loader,
            settings_at=lambda step, first: settings_at(
                recipe,
                step,
                first,
                global_batch_size=state.batch_policy.global_batch_size if state.batch_policy else None,
            ),
            micro_batches=split,
            apply_settings=lambda settings: apply_settings(state.optimizer, settings),
            finish_statistics=lambda: finish_step(state.module, eval_stats=recipe.eval_stats),
            discard_statistics=lambda: discard_step(state.module),
            evaluate=evaluator(
                recipe, runtime, data, world=world, state=state, sinks=sinks, loader=loader, split=split
            ),
            save=saver(recipe, runtime, folder, world=world, state=state, sinks=sinks, stack=stack),
            log=sinks.log,
            total_samples=total_samples(recipe),
            num_train_images=recipe.num_train_images,
            label_smoothing=recipe.label_smoothing,
            eval_every_epochs=recipe.eval_every_epochs,
            eval_offset_epochs=recipe.eval_offset_epochs,
            checkpoint_every_steps=runtime.checkpoint_every_steps,
            max_steps=max_steps,
            stop_requested=stop_requested,
            exchange_report=report,
        )
        if captures.chosen:
            run.captured = CapturedStep(
                functools.partial(captured_work, run), on_failure=_go_on_without(sinks, runtime)
            )
            stack.callback(setattr, run, "captured", None)  # a circle, which would keep graphs and their memory
        yield run


def _split(recipe: Recipe, world: World, micro_batch_size: int) -> Callable[[StepSettings], list[range]]:
    def split(settings: StepSettings) -> list[range]:
        ranges = micro_batches(
            settings.first,
            settings.count,
            rank=world.rank,
            world_size=world.world_size,
            micro_batch_size=micro_batch_size,
            bn_span=recipe.bn_span,
        )
        # A worker without samples (only in the run's last, short batch) still takes part in the exchange.
        return ranges or [range(settings.first, settings.first)]

    return split


def _go_on_without(sinks: Sinks, runtime: Runtime) -> Callable[[Exception], None] | None:
    """A capture that `auto` chose and that fails costs speed, not the run."""
    if runtime.capture == "on":
        return None
    return lambda error: sinks.log({"event": "warning", "text": f"steps are not captured in a CUDA graph: {error}"})


def _warn_of(sinks: Sinks) -> Callable[[str, str], None]:
    return lambda name, reason: sinks.log({"event": "warning", "text": f"{name} was replaced: {reason}"})


def load_for_evaluation(recipe: Recipe, runtime: Runtime, state: dict[str, Any], *, world: World) -> nn.Module:
    """The checkpoint's model, with its averaged weights where the recipe averages them."""
    single = World(device=world.device)
    module = build_model(recipe, runtime, world=single, micro_batch_size=recipe.bn_span)
    module.load_state_dict(state["module"])
    if state["average"]:
        average = WeightAverage(module, recipe.ema_half_life_epochs)
        average.load_state_dict(state["average"])
        with average.swapped():
            averaged = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        module.load_state_dict(averaged)
    return module
