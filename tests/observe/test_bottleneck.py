"""The bottleneck of a run: each cause is named from the times that it leaves in the events."""

from pathlib import Path
from typing import Any

import pytest
from command_line import error_line, megabatch
from run_folders import make_run, step_event

from megabatch.observe.bottleneck import Diagnosis, diagnose
from megabatch.observe.run_folder import load_runs

BALANCED = {"input": 0.01, "forward": 0.2, "backward": 0.4, "exchange": 0.02, "update": 0.02}
LINKED = {"device": "cpu", "wire": "fp32"}


def diagnosis(folder: Path, phases: dict[str, float], compute: list[float], **start: Any) -> Diagnosis:
    """The diagnosis of a run whose updates have these seconds by phase on rank 0, and of computation by rank."""
    slowest = max(range(len(compute)), key=compute.__getitem__)
    ranks = {"median": sorted(compute)[(len(compute) - 1) // 2], "max": max(compute), "slowest": slowest}
    waits = {"median": phases["input"], "max": phases["input"], "slowest": 0}
    fields = {"step_s": sum(phases.values()), "phases_s": phases, "ranks_compute_s": ranks, "ranks_input_s": waits}
    events = [step_event(1, step_s=9.0, phases_s={"input": 9.0}), *(step_event(n, **fields) for n in range(2, 9))]
    return diagnose(load_runs([make_run(folder / "run", events, start=start or LINKED)])[0])


def test_a_balanced_run_is_limited_by_computation(tmp_path: Path) -> None:
    found = diagnosis(tmp_path, BALANCED, [0.6, 0.6])
    assert found.cause == "computation"
    assert sum(found.seconds.values()) == pytest.approx(found.step_s) == 0.65


def test_one_decoding_thread_is_named_with_the_option_that_limits_it(tmp_path: Path) -> None:
    command = "megabatch train photos --decode-threads 1 --workers 1"
    found = diagnosis(tmp_path, BALANCED | {"input": 0.65}, [0.6, 0.6], command=command)
    assert found.cause == "input"
    assert found.changes[0].text.startswith("leave out --decode-threads 1")
    assert found.changes[0].gain == pytest.approx((0.65 + 0.64) / 0.64)


def test_a_slow_link_is_named_where_no_worker_is_slow(tmp_path: Path) -> None:
    found = diagnosis(tmp_path, BALANCED | {"exchange": 0.66}, [0.6, 0.6, 0.6])
    assert found.cause == "exchange"
    half = [change.gain for change in found.changes if "--wire bf16" in change.text]
    assert half == pytest.approx([1.29 / (1.29 - 0.33)])


def test_the_wait_for_an_overloaded_worker_is_not_taken_for_a_slow_link(tmp_path: Path) -> None:
    found = diagnosis(tmp_path, BALANCED | {"exchange": 0.52}, [0.6, 0.6, 1.1, 0.6])
    assert (found.cause, found.slowest) == ("slow worker", 2)
    assert found.seconds["slow worker"] == pytest.approx(0.5)
    assert found.seconds["exchange"] == pytest.approx(0.02)
    assert "rank 2" in found.changes[0].text


def test_the_command_prints_cause_and_changes_and_refuses_a_run_without_times(tmp_path: Path) -> None:
    diagnosis(tmp_path, BALANCED | {"input": 0.65}, [0.6])
    shown = megabatch("doctor", tmp_path / "run").stdout
    assert "bottleneck: input" in shown
    assert "at most 2.02 x the throughput" in shown
    old = make_run(tmp_path / "old", [step_event(step) for step in range(1, 20)])
    assert "0 updates with times" in error_line(megabatch("doctor", old))
