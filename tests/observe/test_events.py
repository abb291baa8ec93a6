"""The event log: complete lines, readable after its writer was killed at any moment."""

import json
import math
import os
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megabatch.errors import UserError
from megabatch.observe.events import EventFollower, EventLog, read_events


def test_events_are_read_in_order_with_their_fields(tmp_path: Path) -> None:
    before = time.time()
    with EventLog(tmp_path / "run" / "events.jsonl") as log:
        log.write("run_start", recipe="fashion_mnist", workers=2)
        log.write("step", step=1, loss=2.25)
    start, step = read_events(tmp_path / "run" / "events.jsonl")
    assert (start["event"], start["recipe"], start["workers"]) == ("run_start", "fashion_mnist", 2)
    assert (step["event"], step["step"], step["loss"]) == ("step", 1, 2.25)
    assert before - 0.001 <= step["time_s"] <= time.time() + 0.001  # milliseconds are written


def test_an_event_can_be_read_before_the_log_is_closed(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write("step", step=1)
    assert [event["step"] for event in read_events(tmp_path / "events.jsonl")] == [1]
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.write("step", step=2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), torch.tensor(math.inf)])
def test_non_finite_numbers_are_written_as_null(tmp_path: Path, value: object) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("step", loss=value, nested={"losses": [value, 1.0]})
    text = (tmp_path / "events.jsonl").read_text()
    event = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert event["loss"] is None
    assert event["nested"] == {"losses": [None, 1.0]}


def test_numpy_torch_and_paths_are_written_as_plain_values(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("x", a=np.int64(3), b=torch.tensor(0.5), c=Path("a/b"), d=(1, 2), e=np.array([1.0, math.nan]))
    (event,) = read_events(tmp_path / "events.jsonl")
    assert {key: event[key] for key in "abcde"} == {"a": 3, "b": 0.5, "c": "a/b", "d": [1, 2], "e": [1.0, None]}


def test_undecodable_bytes_of_a_file_name_are_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xe9t\xe9\n\x1b.jpg")
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("warning", text=name)
    (tmp_path / "events.jsonl").read_text(encoding="utf-8")
    (event,) = read_events(tmp_path / "events.jsonl")
    assert event["text"] == name


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_event_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with (
        patch("megabatch.observe.events._drop_incomplete_line"),  # which would read the endless device
        EventLog(tmp_path / "events.jsonl") as log,
        pytest.raises(OSError, match=r"No space left on device: .*events\.jsonl"),
    ):
        log.write("step", step=1)


def test_a_resumed_run_appends_and_loses_only_the_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("step", step=1)
        log.write("step", step=2)
    path.write_bytes(path.read_bytes()[:-9])  # the writer was killed within the second line
    assert [event["step"] for event in read_events(path)] == [1]
    with EventLog(path) as log:
        log.write("step", step=2)
    assert [event["step"] for event in read_events(path)] == [1, 2]
    assert path.read_text().count("\n") == 2


def test_a_file_truncated_anywhere_keeps_all_complete_lines_readable(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for step in range(3):
            log.write("step", step=step, name="é")
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = content[:length].count(b"\n")
        read = [event["step"] for event in read_events(path)]
        assert read in (list(range(whole)), list(range(whole + 1)))  # a line that lacks only its newline is complete


def test_a_corrupt_line_in_the_middle_is_rejected_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "step"}\n{"event": \n{"event": "step"}\n')
    with pytest.raises(UserError, match="line 2"):
        read_events(path)


def test_a_missing_file_raises_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a run folder"):
        read_events(tmp_path / "events.jsonl")


@given(st.dictionaries(st.text(min_size=1), st.none() | st.booleans() | st.integers() | st.text() | st.floats()))
def test_fields_round_trip_except_non_finite_numbers(fields: dict[str, object]) -> None:
    fields = {key: value for key, value in fields.items() if key not in {"event", "time_s", "self"}}
    with tempfile.TemporaryDirectory() as folder:
        with EventLog(Path(folder) / "events.jsonl") as log:
            log.write("any", **fields)
        (event,) = read_events(Path(folder) / "events.jsonl")
    expected = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
    assert {key: event[key] for key in fields} == expected


def test_a_follower_reads_each_event_once_and_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "st')
    follower = EventFollower(path)
    assert [event["step"] for event in follower.new_events()] == [1]
    assert list(follower.new_events()) == []
    with path.open("a") as file:
        file.write('ep", "step": 2}\n{"event": "new kind"}\n')
    assert [event["event"] for event in follower.new_events()] == ["step", "new kind"]


def test_events_of_a_newer_schema_are_refused_and_unknown_fields_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "run_start", "schema": 1, "new": 2}\n')
    assert read_events(path)[0]["new"] == 2
    path.write_text('{"event": "run_start", "schema": 2}\n')
    with pytest.raises(UserError, match="schema 2, this megabatch reads up to 1"):
        read_events(path)
