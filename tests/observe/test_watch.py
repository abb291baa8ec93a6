"""Following a run: every evaluation, the last update of each look, and the end."""

import io
from pathlib import Path

import pytest
from run_folders import evaluation_event, make_run, step_event

from megabatch.errors import UserError
from megabatch.observe.events import EventLog
from megabatch.observe.progress import Progress
from megabatch.observe.watch import QUIET_S, follow

PHASES = {"step_s": 0.2, "phases_s": {"input": 0.05, "forward": 0.1}}


def watched(folder: Path, *later: dict[str, object], wait_s: float = 20.0) -> list[str]:
    """Returns the lines about a run that writes one of `later` during each pause of the watcher."""
    now_s, rest, stream = [0.0], list(later), io.StringIO()

    def pause(_: float) -> None:
        now_s[0] += wait_s
        event = rest.pop(0)
        with EventLog(folder / "events.jsonl") as log:
            log.write(**event)  # type: ignore[arg-type]

    with Progress(100, 10.0, stream=stream, clock=lambda: now_s[0]) as progress:
        follow(folder, progress, poll_s=1.0, clock=lambda: now_s[0], sleep=pause)
    return stream.getvalue().splitlines()


def test_a_watcher_shows_what_was_written_and_what_is_written_later(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [step_event(1), evaluation_event(1, 0.25), step_event(2, **PHASES)])
    lines = watched(run, step_event(3), evaluation_event(3, 0.5), {"event": "run_end", "top1": 0.5})
    assert lines == [
        "evaluation  epoch 0.10  top1 0.2500  top5 0.9000",
        "epoch 0.20/10  step 2/100  5,000 images/s  loss 1.000  top1 0.2500",
        "  input 25 %  forward 50 %",
        "epoch 0.30/10  step 3/100  5,000 images/s  loss 0.667  top1 0.2500  32 min 20 s left",
        "evaluation  epoch 0.30  top1 0.5000  top5 0.9000",
        "ended  top1 0.5000",
    ]


def test_a_run_that_was_resumed_after_its_end_is_followed_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [{"event": "run_end", "top1": None}, {"event": "run_start"}])
    assert watched(run, {"event": "run_end", "top1": None}) == ["ended without an evaluation"]


def test_a_silent_run_is_reported_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    unknown = {"event": "new kind"}
    lines = watched(run, unknown, {"event": "run_end"}, wait_s=QUIET_S / 2)
    assert lines == ["ended without an evaluation"]
    stream, pauses = io.StringIO(), []

    def pause(_: float) -> None:
        pauses.append(1)
        if len(pauses) == 400:
            raise KeyboardInterrupt

    silent = make_run(tmp_path / "silent", [])
    with Progress(100, 10.0, stream=stream) as progress, pytest.raises(KeyboardInterrupt):
        follow(silent, progress, poll_s=1.0, clock=lambda: float(len(pauses)), sleep=pause)
    assert stream.getvalue() == "no event for 2 min 00 s: the run is in a long step, or was killed\n"


def test_a_folder_without_a_run_cannot_be_watched(tmp_path: Path) -> None:
    with Progress(1, 1.0, enabled=False) as progress, pytest.raises(UserError, match="contains no run"):
        follow(tmp_path, progress, poll_s=1.0)
