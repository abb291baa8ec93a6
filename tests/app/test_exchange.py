"""The gradient exchange of a run: which one is chosen, and that the run's log says so."""

import os

import pytest
from ranks import run_processes
from tiny_run import run_tiny, tiny_recipe

from megabatch.observe.events import read_events
from megabatch.runtime import Runtime


def run_with(folder, all_reduce):
    run_tiny(folder, tiny_recipe(), runtime=Runtime(micro_batch_size=8, all_reduce=all_reduce), max_steps=1)


def run_without_a_table(folder, all_reduce):
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # the user's own cache may hold a table of such a world
    run_with(folder, all_reduce)


def logged_exchanges(folder):
    (start,) = [event for event in read_events(folder / "events.jsonl") if event["event"] == "run_start"]
    return [choice for choice in start["choices"] if choice.startswith("all-reduce")]


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("all_reduce", "logged"),
    [
        ("auto", "all-reduce flat, bucket 25 MiB, wire fp32 (default for gloo, ranks per host 2, as"),
        ("torus", "all-reduce torus 1 x 2, bucket 25 MiB, wire fp32 (as given)"),
    ],
)
def test_a_run_logs_its_gradient_exchange_and_the_reason(tmp_path, all_reduce, logged):
    run_processes(2, run_without_a_table, tmp_path, all_reduce)
    (line,) = logged_exchanges(tmp_path)
    assert line.startswith(logged)


def test_one_worker_has_no_exchange_to_log(tmp_path):
    run_with(tmp_path, "auto")
    assert logged_exchanges(tmp_path) == []
