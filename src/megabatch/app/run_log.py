"""Where a run's facts go: the event file, the screen, and the files beside them."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabatch.app.data import Data
from megabatch.comm.launch import World
from megabatch.kernels import tuning
from megabatch.observe.environment import describe
from megabatch.observe.events import EventLog
from megabatch.observe.progress import Progress
from megabatch.recipe import Recipe, fields_as_json
from megabatch.runtime import Runtime
from megabatch.train.schedule import count_steps
from megabatch.train.state import TrainState


@dataclass
class Sinks:
    """Where a run's facts go: the event file and the screen; both silent on all workers but the first."""

    folder: Path
    progress: Progress
    events: EventLog | None
    quiet: bool = False

    def note(self, text: str) -> None:
        """Shows one line, unless the user wants quiet."""
        if not self.quiet:
            self.progress.note(text)

    def log(self, event: dict[str, Any]) -> None:
        """Writes one event and shows what a person wants of it."""
        if self.events:
            kind = event["event"]
            self.events.write(kind, **{key: value for key, value in event.items() if key != "event"})
        if event["event"] == "step":
            self.progress.step(event["step"], event["epoch"], event["loss"], event["images_per_s"])
        elif event["event"] == "evaluation":
            self.progress.evaluation(event["epoch"], event["top1"], event["top5"], event.get("remark", ""))
        elif event["event"] == "warning":
            self.progress.note(f"warning: {event['text']}")


def open_sinks(recipe: Recipe, folder: Path, *, world: World, quiet: bool, stack: contextlib.ExitStack) -> Sinks:
    """Opened on the first worker, silent on the others; closed with `stack`."""
    progress = Progress(count_steps(recipe), recipe.total_epochs, enabled=world.is_first, quiet=quiet)
    events = None
    if world.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        events = stack.enter_context(EventLog(folder / "events.jsonl"))
    return Sinks(folder, stack.enter_context(progress), events, quiet)


def announce_measuring(sinks: Sinks, stack: contextlib.ExitStack) -> None:
    """Says once, until `stack` ends, that kernels are compiled and timed: a first run is silent for minutes else."""
    table = tuning.table()
    table.on_first = lambda: sinks.note(
        "compiling kernels and timing which are fastest here: a few minutes the first time, then kept for later runs"
    )
    stack.callback(setattr, table, "on_first", None)


def describe_run(
    sinks: Sinks,
    recipe: Recipe,
    runtime: Runtime,
    data: Data,
    world: World,
    micro_batch_size: int,
    choices: Sequence[str],
    state: TrainState,
    resumed_from: int | None,
) -> None:
    """Writes what is trained and where it runs beside the events, and says it in three lines."""
    environment = describe()
    _write_json(sinks.folder / "recipe.json", fields_as_json(recipe))
    _write_json(sinks.folder / "environment.json", environment)
    where = {
        "workers": world.world_size,
        "device": world.device.type,
        "precision": state.precision.name,
        "micro_batch_size": micro_batch_size,
        "choices": list(choices),
        "all_reduce": runtime.all_reduce,
        "wire": runtime.wire,
        "data": data.origin,
    }
    sinks.log({"event": "run_start", "recipe": recipe.name, "resumed_from_step": resumed_from} | where | environment)
    batch = f"{recipe.global_batch_size:,}"
    accumulated = recipe.global_batch_size // (micro_batch_size * world.world_size) or 1
    sinks.note(
        f"{recipe.name}: {recipe.model}, {recipe.num_train_images:,} images from {data.origin}, "
        f"{recipe.total_epochs:g} epochs at global batch {batch}"
    )
    sinks.note(
        f"{world.world_size} worker(s) on {world.device.type}, {state.precision.name}, micro-batch {micro_batch_size} "
        f"x {accumulated} accumulated, batch-norm span {recipe.bn_span}; run folder {sinks.folder}"
    )
    sinks.note(f"chosen: {'; '.join(choices)}")
    if resumed_from is not None:
        sinks.note(f"resumed at step {resumed_from:,}, epoch {state.samples_seen / len(data.train):.2f}")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")
