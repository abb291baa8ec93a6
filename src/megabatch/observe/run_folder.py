"""Run folders: claims one for a run, and reads its events as columns, recipe and environment."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabatch.errors import SettingsError, UserError
from megabatch.files import locked, parse_json
from megabatch.observe.events import Event, read_events
from megabatch.recipe import Recipe, read

EVENTS_FILE = "events.jsonl"
MISTAKES_FILE = "mistakes.json"
_MOST_BYTES = 1 << 20  # of the line of a run's start
RELEASE_S = 45.0
"""Seconds that a resumed run waits for another process to end its writing to the folder."""
NOT_ENVIRONMENT = frozenset({"event", "time_s", "schema", "recipe", "resumed_from_step", "command", "class_names"})
"""Fields of `run_start` that do not describe the environment."""


def held_out_fraction(folder: Path) -> float | None:
    """The `--val-fraction` of the run in `folder`; None without one, or without readable events."""
    try:
        with (folder / EVENTS_FILE).open("rb") as file:
            start = parse_json(file.readline(_MOST_BYTES))
        fraction = start["val_fraction"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return fraction if isinstance(fraction, float) and 0 < fraction < 1 else None


@dataclass(frozen=True)
class Span:
    """One operation within an update; spans of a lane share a row of the timeline."""

    lane: str
    name: str
    start_ms: float
    length_ms: float


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run folder; `label` is unique among the runs of a page.

    Steps, evaluations and observations are the events of these kinds; `started_s` is the time of the first event.
    """

    label: str
    started_s: float
    start: Event
    steps: list[Event]
    evaluations: list[Event]
    observations: list[Event]
    bad_samples: Event | None
    environment: dict[str, Any]
    warnings: list[str]
    end: Event | None
    recipe: Recipe | None
    timeline: list[Span]
    mistakes: dict[str, Any] | None = None  # of the last evaluation, from `MISTAKES_FILE`

    def column(self, field: str, kind: str = "step", key: str | None = None) -> list[float]:
        """Returns `field`, or `field[key]`, of every event of a kind; NaN where it is not a number.

        `kind` is "step", "evaluation" or "observation".
        """
        events = {"step": self.steps, "evaluation": self.evaluations, "observation": self.observations}[kind]
        values = (event.get(field) for event in events)
        return [
            _number(value if key is None else value.get(key) if isinstance(value, dict) else None) for value in values
        ]

    @property
    def top1(self) -> float | None:
        """Top-1 of the last evaluation, in [0, 1]; None without one."""
        values = [value for value in self.column("top1", "evaluation") if math.isfinite(value)]
        return values[-1] if values else None

    @property
    def best_top1(self) -> float | None:
        """Highest top-1 of all evaluations, in [0, 1]; None without one."""
        return max((value for value in self.column("top1", "evaluation") if math.isfinite(value)), default=None)

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
    observations = _without_repeated_steps(events, "observation")
    return RunRecord(
        label=recipe.name if recipe else str(start.get("recipe") or folder.resolve().name),
        started_s=_number(events[0].get("time_s")) if events else math.nan,
        start=start,
        steps=_without_repeated_steps(events, "step"),
        observations=observations,
        bad_samples=_last(events, "bad_samples"),
        evaluations=_without_repeated_steps(events, "evaluation"),
        environment=_flat({key: value for key, value in start.items() if key not in NOT_ENVIRONMENT}),
        warnings=[str(event.get("text", "")) for event in events if event["event"] == "warning"],
        end=_last(events, "run_end"),
        recipe=recipe,
        timeline=_middle_spans(observations),
        mistakes=_read_mistakes(folder / MISTAKES_FILE),
    )


def _read_mistakes(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); without it the report shows the rest") from error
    return value if isinstance(value, dict) else None


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


def _middle_spans(observations: list[Event]) -> list[Span]:
    """Returns the spans of the middle observed update; early updates are not typical: they compile and allocate."""
    observed = [event["spans"] for event in observations if event.get("spans")]
    middle = observed[len(observed) // 2] if observed else []
    try:
        return [Span(str(lane), str(name), _number(start), _number(length)) for lane, name, start, length in middle]
    except (TypeError, ValueError):
        return []  # not written by this version


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
