"""Run folders: claims one for a run, and reads its events as columns, recipe, environment and timeline."""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabatch.errors import SettingsError, UserError
from megabatch.files import locked, printable, read_json
from megabatch.observe.events import Event, read_events
from megabatch.recipe import Recipe, read

EVENTS_FILE = "events.jsonl"
RELEASE_S = 45.0
"""Seconds that a resumed run waits for another process to end its writing to the folder."""
NOT_ENVIRONMENT = frozenset({"event", "time_s", "schema", "recipe", "resumed_from_step", "command", "class_names"})
"""Fields of `run_start` that do not describe the environment."""


@dataclass(frozen=True)
class Span:
    """One operation within an update; spans of a lane share a row of the timeline."""

    lane: str
    name: str
    start_ms: float
    length_ms: float


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run folder; `label` is unique among the runs of a page."""

    label: str
    steps: list[Event]
    evaluations: list[Event]
    environment: dict[str, Any]
    warnings: list[str]
    end: Event | None
    recipe: Recipe | None
    timeline: list[Span]

    def column(self, field: str) -> list[float]:
        """Returns `field` of every step; NaN where it is not a number."""
        return [_number(event.get(field)) for event in self.steps]

    def evaluation_column(self, field: str) -> list[float]:
        """Returns `field` of every evaluation; NaN where it is not a number."""
        return [_number(event.get(field)) for event in self.evaluations]

    @property
    def top1(self) -> float | None:
        """Top-1 of the last evaluation, in [0, 1]; None without one."""
        values = [value for value in self.evaluation_column("top1") if math.isfinite(value)]
        return values[-1] if values else None

    @property
    def best_top1(self) -> float | None:
        """Highest top-1 of all evaluations, in [0, 1]; None without one."""
        return max((value for value in self.evaluation_column("top1") if math.isfinite(value)), default=None)

    @property
    def images_per_s(self) -> float | None:
        """Throughput of the whole run if it has ended, else the median over its steps; None without steps."""
        if self.end and self.end.get("images_per_s"):
            return float(self.end["images_per_s"])
        values = sorted(value for value in self.column("images_per_s") if math.isfinite(value))
        return values[len(values) // 2] if values else None


def holds_run(folder: Path) -> bool:
    """True if a run has written events to `folder`."""
    events = folder / EVENTS_FILE
    return events.is_file() and events.stat().st_size > 0


def require_no_run(folder: Path) -> None:
    """Raises SettingsError if `folder` holds a run."""
    if holds_run(folder):
        raise SettingsError(f"{folder} already holds a run; --resume continues it, another --output starts a new one")


@contextlib.contextmanager
def claimed(folder: Path, *, resume: bool) -> Iterator[Path]:
    """Creates `folder` and reserves it for one run within the block; yields the path of its event file.

    If nothing is written, the event file, and the folder if it was created here, are removed again. A resumed run waits
    `RELEASE_S` for the folder: workers whose launcher was killed may still be writing their last checkpoint.

    Raises:
        SettingsError: another process is writing to the folder, or it holds a run and `resume` is not set.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    events = folder / EVENTS_FILE
    with contextlib.ExitStack() as stack:
        deadline = time.monotonic() + (RELEASE_S if resume else 0.0)
        while not _reserved(events, stack):
            if time.monotonic() > deadline:
                raise SettingsError(f"another process is writing to {folder}; another --output starts a new run")
            time.sleep(0.2)
        if not resume:
            require_no_run(folder)
        stack.callback(_remove_if_unused, folder, is_new=is_new)
        yield events


def _reserved(events: Path, stack: contextlib.ExitStack) -> bool:
    """Locks the event file until `stack` ends; False if another process holds the lock."""
    try:
        stack.enter_context(locked(events, wait=False))
    except BlockingIOError:
        return False
    return True


def _remove_if_unused(folder: Path, *, is_new: bool) -> None:
    if holds_run(folder):
        return
    (folder / EVENTS_FILE).unlink(missing_ok=True)
    if is_new:
        with contextlib.suppress(OSError):  # something else is in it
            folder.rmdir()


def load_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Returns the runs in `folders`. Labels are recipe names, with the folder's name where those are not unique.

    Raises:
        UserError: a folder contains no run.
    """
    runs = [_load(folder) for folder in folders]
    labels = [run.label for run in runs]
    return [
        run if labels.count(run.label) == 1 else dataclasses.replace(run, label=_longer_label(run, folder))
        for run, folder in zip(runs, folders, strict=True)
    ]


def _longer_label(run: RunRecord, folder: Path) -> str:
    name = folder.resolve().name
    return name if run.label in name else f"{run.label} ({name})"


def _load(folder: Path) -> RunRecord:
    path = folder / EVENTS_FILE
    if not path.is_file():
        raise UserError(f"{folder} contains no run (no events.jsonl); give the folder that `megabatch train` printed")
    events = read_events(path)
    start = _last(events, "run_start") or {}
    recipe = read(folder / "recipe.json") if (folder / "recipe.json").is_file() else None
    steps = _without_repeated_steps(events, "step")
    return RunRecord(
        label=recipe.name if recipe else str(start.get("recipe") or folder.resolve().name),
        steps=steps,
        evaluations=_without_repeated_steps(events, "evaluation"),
        environment=_flat({key: value for key, value in start.items() if key not in NOT_ENVIRONMENT}),
        warnings=[str(event.get("text", "")) for event in events if event["event"] == "warning"],
        end=_last(events, "run_end"),
        recipe=recipe,
        timeline=_read_trace(folder / "timeline.json") or _spans_of_buckets(steps),
    )


def _without_repeated_steps(events: list[Event], kind: str) -> list[Event]:
    """Returns the events of one kind; steps that a resumed run repeated keep only the later event."""
    kept: list[Event] = []
    for event in events:
        if event["event"] != kind:
            continue
        # a resumed run starts at its checkpoint, before the last logged step
        while kept and (kept[-1].get("step") or 0) >= (event.get("step") or 0):
            kept.pop()
        kept.append(event)
    return kept


def _last(events: list[Event], kind: str) -> Event | None:
    return next((event for event in reversed(events) if event["event"] == kind), None)


def _spans_of_buckets(steps: list[Event]) -> list[Span]:
    """Returns the gradient exchange of the middle update; early updates are not typical: they compile and allocate."""
    updates = [event["buckets"] for event in steps if event.get("buckets") and isinstance(event["buckets"], list)]
    spans = []
    for bucket in updates[len(updates) // 2] if updates else []:
        try:
            lane = f"bucket {bucket['index']}"
            ready, sent, done = (float(bucket[name]) for name in ("ready_ms", "sent_ms", "done_ms"))
        except (TypeError, KeyError, ValueError, OverflowError):
            continue  # not written by this version
        spans += [Span(lane, "waiting", ready, sent - ready), Span(lane, "exchange", sent, done - sent)]
    return spans


def _read_trace(path: Path) -> list[Span]:
    """Returns the last update in a Chrome trace (its complete events, `ph` X); empty if there is no file."""
    if not path.is_file():
        return []
    try:
        content = read_json(path)
        listed = content.get("traceEvents", []) if isinstance(content, dict) else content
        return _spans_of_last_update([event for event in listed if isinstance(event, dict) and event.get("ph") == "X"])
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is not a JSON trace ({error}); remove it to write the report without it") from None


def _spans_of_last_update(events: list[Event]) -> list[Span]:
    events = [event for event in events if "ts" in event]
    events = [event for event in events if _step_of(event) == _step_of(events[-1])]
    lanes: dict[Any, str] = {}  # a thread is named after its first event
    for event in events:
        lanes.setdefault(_thread(event), printable(str(event.get("name", ""))))
    spans = []
    for event in events:
        start_ms, length_ms = float(event["ts"]) / 1e3, float(event.get("dur", 0)) / 1e3
        if not math.isfinite(start_ms + length_ms):
            raise ValueError("a time is not finite")
        spans.append(Span(lanes[_thread(event)], _kind(event), start_ms, length_ms))
    return spans


def _step_of(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("step")


def _kind(event: dict[str, Any]) -> str:
    """Returns the event's name without its number, so that all buckets have one kind."""
    return re.sub(r"[ _]\d+$", "", printable(str(event.get("name", ""))))


def _thread(event: dict[str, Any]) -> tuple[Any, Any]:
    return event.get("pid"), event.get("tid")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
