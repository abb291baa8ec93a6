"""A run folder read back: its events as columns, its recipe, what it ran on."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabatch.errors import UserError
from megabatch.observe.events import Event, read_events
from megabatch.recipe import Recipe, read

ENVIRONMENT_ONLY = frozenset({"event", "time_s", "recipe", "resumed_from_step"})


@dataclass(frozen=True)
class Span:
    """Something that took time within one update: which row of the drawing, what, when."""

    lane: str
    name: str
    start_ms: float
    length_ms: float


@dataclass(frozen=True)
class RunRecord:
    """One run as its folder tells it; `label` tells it from others on the same page."""

    label: str
    steps: list[Event]
    evaluations: list[Event]
    environment: dict[str, Any]
    warnings: list[str]
    end: Event | None
    recipe: Recipe | None
    timeline: list[Span]

    def column(self, field: str) -> list[float]:
        """`field` of every step; NaN where a step has no number."""
        return [_number(event.get(field)) for event in self.steps]

    def evaluation_column(self, field: str) -> list[float]:
        """`field` of every evaluation; NaN where there is no number."""
        return [_number(event.get(field)) for event in self.evaluations]

    @property
    def top1(self) -> float | None:
        """The last evaluation's top-1."""
        values = [value for value in self.evaluation_column("top1") if math.isfinite(value)]
        return values[-1] if values else None

    @property
    def best_top1(self) -> float | None:
        """The highest top-1 of all evaluations."""
        return max((value for value in self.evaluation_column("top1") if math.isfinite(value)), default=None)

    @property
    def images_per_s(self) -> float | None:
        """Of the whole run where it ended, else the median of its steps."""
        if self.end and self.end.get("images_per_s"):
            return float(self.end["images_per_s"])
        values = sorted(value for value in self.column("images_per_s") if math.isfinite(value))
        return values[len(values) // 2] if values else None


def load_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Every run, with labels that differ: the recipe's name, and the folder's where that is not enough.

    Raises:
        UserError: a folder holds no run.
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
    path = folder / "events.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} holds no run (no events.jsonl); give the folder that `megabatch train` named")
    events = read_events(path)
    start = _last(events, "run_start") or {}
    recipe = read(folder / "recipe.json") if (folder / "recipe.json").is_file() else None
    steps = _last_path(events, "step")
    return RunRecord(
        label=recipe.name if recipe else str(start.get("recipe") or folder.resolve().name),
        steps=steps,
        evaluations=_last_path(events, "evaluation"),
        environment=_flat({key: value for key, value in start.items() if key not in ENVIRONMENT_ONLY}),
        warnings=[str(event.get("text", "")) for event in events if event["event"] == "warning"],
        end=_last(events, "run_end"),
        recipe=recipe,
        timeline=_read_trace(folder / "timeline.json") or _spans_of_buckets(steps),
    )


def _last_path(events: list[Event], kind: str) -> list[Event]:
    """Events of one kind, less those of steps that a resumed run did again."""
    kept: list[Event] = []
    for event in events:
        if event["event"] != kind:
            continue
        while kept and kept[-1].get("step", 0) >= event.get("step", 0):
            kept.pop()
        kept.append(event)
    return kept


def _last(events: list[Event], kind: str) -> Event | None:
    return next((event for event in reversed(events) if event["event"] == kind), None)


def _spans_of_buckets(steps: list[Event]) -> list[Span]:
    """The gradient exchange of the update in the middle of the run: early ones compile and allocate."""
    told = [event["buckets"] for event in steps if event.get("buckets")]
    spans = []
    for bucket in told[len(told) // 2] if told else []:
        lane, ready, sent, done = (
            f"bucket {bucket['index']}",
            bucket["ready_ms"],
            bucket["sent_ms"],
            bucket["done_ms"],
        )
        spans += [Span(lane, "waiting", ready, sent - ready), Span(lane, "exchange", sent, done - sent)]
    return spans


def _read_trace(path: Path) -> list[Span]:
    """The last update in a trace of Chrome's format (its complete events, `ph` X); empty where there is no file."""
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no trace ({error}); remove it to make the report without it") from None
    listed = content.get("traceEvents", []) if isinstance(content, dict) else content
    events = [event for event in listed if isinstance(event, dict) and event.get("ph") == "X" and "ts" in event]
    events = [event for event in events if _step_of(event) == _step_of(events[-1])]
    lanes: dict[Any, str] = {}
    for event in events:
        lanes.setdefault(_thread(event), str(event.get("name", "")))
    return [Span(lanes[_thread(event)], _kind(event), event["ts"] / 1e3, event.get("dur", 0) / 1e3) for event in events]


def _step_of(event: dict[str, Any]) -> Any:
    return event.get("args", {}).get("step")


def _kind(event: dict[str, Any]) -> str:
    """The event's name without its number: all buckets are of one kind."""
    return re.sub(r"[ _]\d+$", "", str(event.get("name", "")))


def _thread(event: dict[str, Any]) -> tuple[Any, Any]:
    return event.get("pid"), event.get("tid")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
