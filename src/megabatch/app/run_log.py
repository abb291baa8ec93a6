"""The log of a run: events.jsonl, the screen, and the JSON files beside the events."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from megabatch.app.data import Data
from megabatch.app.measured import tuning
from megabatch.comm.launch import World, on_rank0
from megabatch.files import write_text
from megabatch.observe.curve import Curve, against_curve, curve_text
from megabatch.observe.environment import command_line, describe
from megabatch.observe.events import SCHEMA, EventLog, EventWriter
from megabatch.observe.progress import Progress
from megabatch.observe.run_folder import EVENTS_FILE, claimed
from megabatch.observe.trackers import open_tracker
from megabatch.recipe import Recipe, fields_as_json
from megabatch.runtime import Runtime
from megabatch.train.checkpoint import CheckpointInfo
from megabatch.train.evaluate import MOST_CONFUSION_CLASSES
from megabatch.train.schedule import count_steps, end_of_steps
from megabatch.train.state import TrainState


@dataclass
class RunLog:
    """Event file and screen of a run; silent on all ranks but 0."""

    folder: Path
    progress: Progress
    writers: Sequence[EventWriter] = ()
    quiet: bool = False
    published_curve: Curve = ()

    def note(self, text: str) -> None:
        """Prints one line, except under --quiet."""
        if not self.quiet:
            self.progress.note(text)

    def warn(self, text: str) -> None:
        """Logs a warning, which is also printed."""
        self.log({"event": "warning", "text": text})

    def log(self, event: dict[str, Any]) -> None:
        """Writes one event and prints its main numbers."""
        if event["event"] == "evaluation":
            event = event | self._against_curve(event["epoch"], event["top1"])
        for writer in self.writers:
            writer.write(**event)
        if event["event"] == "step":
            self.progress.step(event["step"], event["epoch"], event["loss"], event["images_per_s"])
        elif event["event"] == "evaluation":
            self.progress.evaluation(event["epoch"], event["top1"], event["top5"], event.get("remark", ""))
        elif event["event"] == "early_stop":
            self.note(event["text"])
        elif event["event"] == "warning":
            self.progress.note(f"warning: {event['text']}")

    def _against_curve(self, epoch: float, top1: float) -> dict[str, Any]:
        """Comparison with the recipe's published accuracy curve, if there is one."""
        place = against_curve(self.published_curve, epoch, top1)
        if place is None:
            return {}
        return {"against_curve": place, "remark": curve_text(self.published_curve, epoch, top1)}


def open_run_log(
    recipe: Recipe, runtime: Runtime, folder: Path, *, world: World, quiet: bool, stack: contextlib.ExitStack
) -> RunLog:
    """Opens the log on rank 0, a silent one on other ranks; closed with `stack`.

    Raises:
        SettingsError: another process is writing to the folder, it holds a run and `runtime.resume` is not set, or
            the tracker cannot start.
    """
    on_rank0(lambda: stack.enter_context(claimed(folder, resume=bool(runtime.resume))), world)
    writers: list[EventWriter] = []
    on_rank0(lambda: writers.extend(_open_writers(recipe, runtime, folder, stack)), world)
    progress = Progress(count_steps(recipe), recipe.total_epochs, enabled=world.is_first, quiet=quiet)
    return RunLog(folder, stack.enter_context(progress), writers, quiet, recipe.published_curve)


def _open_writers(recipe: Recipe, runtime: Runtime, folder: Path, stack: contextlib.ExitStack) -> list[EventWriter]:
    """Opens events.jsonl and the tracker, if there is one; closed with `stack`."""
    writers: list[EventWriter] = [stack.enter_context(EventLog(folder / EVENTS_FILE))]
    if tracker := open_tracker(runtime.track, folder, fields_as_json(recipe)):
        stack.callback(tracker.close)
        writers.append(tracker)
    return writers


def announce_measuring(log: RunLog, world: World, stack: contextlib.ExitStack) -> None:
    """Prints one line when kernels are first timed; in force until `stack` ends. On a GPU they are compiled, too."""
    compiling, time = ("", "seconds") if world.device.type == "cpu" else ("compiling and ", "a few minutes")
    table = tuning.table()
    table.on_first = lambda: log.note(
        f"{compiling}timing kernels for this machine: {time} in the first run, kept for later runs"
    )
    stack.callback(setattr, table, "on_first", None)


def describe_run(
    log: RunLog,
    recipe: Recipe,
    runtime: Runtime,
    data: Data,
    world: World,
    micro_batch_size: int,
    choices: Sequence[str],
    state: TrainState,
    resumed: CheckpointInfo | None,
    max_steps: int | None,
) -> None:
    """Writes recipe.json and environment.json and logs the run's start, in three lines on the screen."""
    environment = describe()
    _write_json(log.folder / "recipe.json", fields_as_json(recipe))
    _write_json(log.folder / "environment.json", environment)
    where = {
        "workers": world.world_size,
        "device": world.device.type,
        "precision": state.precision.name,
        "micro_batch_size": micro_batch_size,
        "choices": list(choices),
        "all_reduce": runtime.all_reduce,
        "wire": runtime.wire,
        "data": data.origin,
    } | ({} if runtime.val_fraction is None else {"val_fraction": runtime.val_fraction})
    resumed_from = resumed.step if resumed else None
    start = {"event": "run_start", "schema": SCHEMA, "recipe": recipe.name, "resumed_from_step": resumed_from}
    known = {"command": command_line(), "class_names": list(data.train.class_names)[:MOST_CONFUSION_CLASSES]}
    log.log(start | known | where | environment)
    batch = f"{recipe.global_batch_size:,}"
    accumulated = recipe.global_batch_size // (micro_batch_size * world.world_size) or 1
    log.note(
        f"{recipe.name}: {recipe.model}{_stem(state.module)}, {recipe.num_train_images:,} images from {data.origin}, "
        f"{recipe.total_epochs:g} epochs at global batch {batch}"
    )
    log.note(
        f"{world.world_size} worker(s) on {world.device.type}, {state.precision.name}, micro-batch {micro_batch_size} "
        f"x {accumulated} accumulated, batch-norm span {recipe.bn_span}; run folder {log.folder}"
    )
    log.note(f"chosen: {'; '.join(choices)}")
    if max_steps:
        end = end_of_steps(recipe, state.samples_seen, max_steps)
        log.progress.end_at(min(count_steps(recipe), state.step + max_steps), end / recipe.num_train_images)
    for text in data.notes:
        log.log({"event": "warning", "text": f"data: {text}"})
    if resumed:
        log.note(f"resumed at step {resumed.step:,}, epoch {state.samples_seen / len(data.train):.2f}")


def _stem(module: nn.Module) -> str:
    """The first convolution in words: in ResNet-18, 34 and 50 it depends on the training resolution or `stem`."""
    first = getattr(module, "conv1", None)
    return (
        f" with a {first.kernel_size[0]}x{first.kernel_size[1]} stem of stride {first.stride[0]}"
        if isinstance(first, nn.Conv2d)
        else ""
    )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=1) + "\n")
