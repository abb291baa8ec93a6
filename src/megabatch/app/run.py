"""Composition root of one run: builds everything the training loop uses, and takes it down again."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megabatch.app.data import Data, build_eval_loader, build_train_loader
from megabatch.app.exchange import build_exchange
from megabatch.app.initial_weights import match_weights, read_weights
from megabatch.app.measured.choices import keep_choices, with_earlier_choices
from megabatch.app.measured.layout import measured_layout
from megabatch.app.measured.micro_batch import fit_micro_batch
from megabatch.app.measured.precision import measured_precision
from megabatch.app.mistakes import write_mistakes
from megabatch.app.model import image_format
from megabatch.app.resolve import (
    check,
    choose_capture,
    choose_memory,
    cudnn_measures,
    describe_kernels,
)
from megabatch.app.run_log import RunLog, announce_measuring, describe_run, open_run_log
from megabatch.app.span_tiles import span_tiles
from megabatch.app.state import build_state, check_same_weights, resume, whitened_stem
from megabatch.comm.launch import World
from megabatch.nn.fused.fuse import can_fuse
from megabatch.nn.loss import inverse_frequency_weights
from megabatch.observe.device_use import DeviceUse
from megabatch.observe.run_folder import MISTAKES_FILE, holds_run
from megabatch.recipe import Recipe, fields_as_json
from megabatch.runtime import Runtime, parse_interval
from megabatch.train.checkpoint import CheckpointWriter
from megabatch.train.cuda_graph import CapturedStep
from megabatch.train.health.memory_copies import MemoryCopies, remove_copies, remove_outdated_copies
from megabatch.train.measuring.trace import TRACE_FILE, Trace
from megabatch.train.state import Run
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
    """Builds a run on this worker; closes its files, threads and process groups at the end.

    Raises:
        RecipeError, SettingsError: recipe and runtime do not fit together.
        SettingsError: another process writes to `folder`, or it holds a run and `runtime.resume` is not set.
        CheckpointError: `runtime.resume`, and the folder's run has another recipe.
        DataError: `runtime.resume`, and the data has other classes than the folder's run.
    """
    wished = check(recipe, runtime, world_size=world.world_size, device=world.device)
    capture = choose_capture(recipe, runtime, world)
    memory = choose_memory(runtime, world)
    with contextlib.ExitStack() as stack:
        stack.enter_context(cudnn_measures(runtime, world.device))
        tiles = span_tiles(recipe, runtime, world=world, micro_batch_size=wished)
        has_copies = runtime.memory_copy_every_steps > 0 and world.local_rank == 0
        if has_copies:
            remove_outdated_copies(folder, resume=bool(runtime.resume), has_run=holds_run(folder))
        log = open_run_log(recipe, runtime, folder, world=world, quiet=quiet, stack=stack)
        announce_measuring(log, world, stack)
        if runtime.resume:
            runtime = with_earlier_choices(runtime, folder, world=world)
        precision = measured_precision(recipe, runtime, world=world, micro_batch_size=wished)
        runtime = measured_layout(recipe, runtime, precision, world=world, warn=log.warn)
        initial = read_weights(runtime.init_from, data.train.class_names) if runtime.init_from else None
        options: dict[str, Any] = {"world": world, "micro_batch_size": wished, "capturable": capture.chosen}
        options |= {"initial": initial, "stem_weight": whitened_stem(recipe, runtime, data, world=world)}
        state = build_state(recipe, runtime, precision, **options)
        resumed = None
        if runtime.resume:
            resumed, data = resume(state, recipe, data, folder, world=world, log=log, with_copies=has_copies)
        check_same_weights(state.module, world)
        micro_batch = fit_micro_batch(recipe, runtime, wished, state.module, state.precision, world=world)
        model, exchange_report, exchange = build_exchange(
            recipe, state, runtime, world=world, capture=capture.chosen, stack=stack
        )
        copies = _open_copies(recipe, data, folder, stack) if has_copies else None
        for kept in ([folder] if world.is_first else []) + ([copies.folder] if copies else []):
            keep_choices(runtime, kept, precision=precision.name, world=world)
        if world.is_first:
            kernels = describe_kernels(runtime, precision, world.device, fusible=can_fuse(state.module))
            choices = [f"micro-batch {micro_batch.reason}", kernels, memory, capture.reason, *exchange]
            choices += [str(tiles)] if str(tiles) else []
            choices += [f"initial weights: {match_weights(state.module, initial)}"] if initial else []
            describe_run(log, recipe, runtime, data, world, micro_batch.size, choices, state, resumed, max_steps)
        images = image_format(runtime, state.module, state.precision, world.device)
        loader = build_train_loader(
            recipe, runtime, data.train, world=world, on_bad_sample=_warn_of(log), **images._asdict()
        )
        stack.callback(loader.close)
        run = Run(
            recipe=recipe,
            world=world,
            state=state,
            model=model,
            loader=loader,
            eval_data=build_eval_loader(recipe, runtime, data.evaluation, world=world),
            micro_batch_size=micro_batch.size,
            stream_rank=tiles.stream_rank(world),
            log=log.log,
            stop_requested=stop_requested,
            checkpoints=_open_checkpoints(recipe, runtime, data, folder, log=log, stack=stack)
            if world.is_first
            else None,
            memory_copies=copies,
            memory_copy_every_steps=runtime.memory_copy_every_steps,
            checkpoint_every=parse_interval("--checkpoint-every", runtime.checkpoint_every),
            compare_every_steps=runtime.compare_every_steps,
            max_steps=max_steps,
            exchange_report=exchange_report,
            class_weights=_class_weights(recipe, data, world),
            trace=Trace(folder / TRACE_FILE, num_steps=runtime.trace_steps) if runtime.trace_steps else None,
        )
        if world.is_first:
            use = DeviceUse(world.device)
            stack.callback(use.close)
            run.device_use = use.read
            run.show_mistakes = functools.partial(write_mistakes, folder / MISTAKES_FILE, data.evaluation)
        if capture.chosen:
            work = functools.partial(captured_work, run)
            run.captured = CapturedStep(work, on_failure=_fall_back_uncaptured(log, runtime))
            stack.callback(setattr, run, "captured", None)  # breaks a reference cycle that holds graph memory
        yield run
    if has_copies:
        remove_copies(folder)


def _class_weights(recipe: Recipe, data: Data, world: World) -> torch.Tensor | None:
    """Weights of the classes in the loss, from the labels of the training data."""
    if not recipe.class_weight_power:
        return None
    labels = torch.as_tensor(data.train.labels).cpu()
    return inverse_frequency_weights(labels, recipe.num_classes, recipe.class_weight_power).to(world.device)


def _open_checkpoints(
    recipe: Recipe, runtime: Runtime, data: Data, folder: Path, *, log: RunLog, stack: contextlib.ExitStack
) -> CheckpointWriter:
    """A background writer whose last checkpoint is on disk when `stack` ends."""
    writer = CheckpointWriter(
        folder / "checkpoints",
        fields_as_json(recipe),
        class_names=tuple(data.train.class_names),
        keep=runtime.keep_checkpoints,
        on_remark=log.warn,
    )
    stack.callback(writer.wait)
    return writer


def _open_copies(recipe: Recipe, data: Data, folder: Path, stack: contextlib.ExitStack) -> MemoryCopies:
    copies = MemoryCopies(folder, fields_as_json(recipe), class_names=tuple(data.train.class_names))
    stack.callback(copies.wait)
    return copies


def _fall_back_uncaptured(log: RunLog, runtime: Runtime) -> Callable[[Exception], None] | None:
    """A failed capture that `auto` chose is a warning; with `capture=on` it is an error."""
    if runtime.capture == "on":
        return None
    return lambda error: log.warn(f"steps are not captured in a CUDA graph: {error}")


def _warn_of(log: RunLog) -> Callable[[str, str], None]:
    return lambda name, reason: log.warn(f"{name} was replaced: {reason}")
