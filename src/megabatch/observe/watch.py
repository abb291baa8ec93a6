"""Follows a run through its event file, from another terminal or machine."""

import time
from collections.abc import Callable
from pathlib import Path

from megabatch.errors import UserError
from megabatch.observe.events import Event, EventFollower
from megabatch.observe.progress import Progress, duration
from megabatch.observe.run_folder import EVENTS_FILE

QUIET_S = 120.0
"""Seconds without an event after which one line says so."""


def follow(
    folder: Path,
    progress: Progress,
    *,
    poll_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Shows the run's events on `progress` as they are written, until the run ends.

    Of what was written before a look at the file, it shows all evaluations and warnings, and the last update.

    Raises:
        UserError: the folder holds no run, or the event file is corrupt.
    """
    if not (folder / EVENTS_FILE).is_file():
        raise UserError(f"{folder} contains no run (no {EVENTS_FILE}); give the folder that `megabatch train` printed")
    follower, ended, last_s, is_quiet = EventFollower(folder / EVENTS_FILE), False, clock(), False
    while not ended:
        events = list(follower.new_events())
        if events:
            last_s, is_quiet = clock(), False
            ended = _show(events, progress)
        elif clock() - last_s >= QUIET_S and not is_quiet:
            is_quiet = True
            progress.note(f"no event for {duration(QUIET_S)}: the run is in a long step, or was killed")
        if not ended:
            sleep(poll_s)


def _show(events: list[Event], progress: Progress) -> bool:
    """Shows events; returns True if the run has ended, and was not started again."""
    ended = False
    for event in events:
        kind = event["event"]
        ended = kind == "run_end" or (ended and kind != "run_start")
        if kind == "evaluation":
            progress.evaluation(event["epoch"], event["top1"] or 0.0, event.get("top5"), event.get("remark", ""))
        elif kind == "warning":
            progress.note(f"warning: {event.get('text', '')}")
    step = next((event for event in reversed(events) if event["event"] == "step"), None)
    if step is not None:
        loss = float("nan") if step["loss"] is None else step["loss"]
        progress.step(step["step"], step["epoch"], loss, step["images_per_s"], detail=phase_shares(step))
    if ended:
        end = next(event for event in reversed(events) if event["event"] == "run_end")
        top1 = end.get("top1")
        progress.note("ended" + (f"  top1 {top1:.4f}" if top1 is not None else " without an evaluation"))
    return ended


def phase_shares(step: Event) -> str:
    """Returns the share of each phase in the step, such as `input 4 %  forward 28 %`; empty for older events."""
    phases, total = step.get("phases_s") or {}, step.get("step_s")
    if not total:
        return ""
    return "  ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in phases.items())
