"""The trace of some updates: events that Perfetto can draw, of every worker, in one file."""

import itertools
import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from ranks import run_processes
from tiny_run import run_tiny, tiny_recipe

from megabatch.runtime import Runtime
from megabatch.train.measuring.trace import TraceSpan, chrome_trace

RUNTIME = Runtime(precision="fp32", micro_batch_size=8, trace_steps=2, all_reduce="torus", bucket_mib=0.05)


def traced(folder, **changes):
    """Trains two epochs of five updates; the weights."""
    return run_tiny(folder, tiny_recipe(**changes), runtime=RUNTIME)["weights"]


def tracks_of(path: Path) -> dict[tuple[int, str], list[dict]]:
    """Spans by rank and name of the track, in the file's order."""
    trace = json.loads(path.read_text(encoding="utf-8"))
    assert trace["displayTimeUnit"] == "ms"
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"}
    assert len(set(threads.items())) == len(threads)
    found = defaultdict(list)
    for event in trace["traceEvents"]:
        assert event["ph"] in {"M", "X"}
        if event["ph"] == "X":
            found[event["pid"], threads[event["pid"], event["tid"]]].append(event)
    return found


def assert_sound(spans: list[dict]) -> None:
    """Starts do not decrease, nothing is negative, and two spans of a track are nested or apart (to 2 ns)."""
    open_ends: list[float] = []
    for before, span in itertools.pairwise([{"ts": 0.0}, *spans]):
        assert span["ts"] >= before["ts"]
        assert span["dur"] >= 0
        while open_ends and open_ends[-1] <= span["ts"] + 0.002:
            open_ends.pop()
        end = span["ts"] + span["dur"]
        assert not open_ends or end <= open_ends[-1] + 0.002
        open_ends.append(end)


def inside(spans: list[dict], outer: dict) -> list[str]:
    end = outer["ts"] + outer["dur"]
    return [s["name"] for s in spans if outer["ts"] <= s["ts"] + 0.002 and s["ts"] + s["dur"] <= end + 0.002]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    traced(folder)
    return folder


def test_the_last_updates_before_the_evaluation_are_traced_with_layers_evaluation_and_checkpoint(folder):
    tracks = tracks_of(folder / "trace.json")
    assert set(tracks) == {(0, "training"), (0, "checkpoint file")}
    spans = tracks[0, "training"]
    assert [s["name"] for s in spans if s["name"].startswith("update ")] == ["update 4", "update 5"]
    assert [s["name"] for s in spans][-2:] == ["evaluation", "checkpoint"]
    for update in (s for s in spans if s["name"].startswith("update ")):
        names = inside(spans, update)
        assert names.count("forward") == names.count("backward") == names.count("input") == 6  # micro-batches
        assert names.count("conv1") == 6
        assert update["args"]["layers_left_out"] == 0
        assert update["args"]["images"] == 48
    forwards = [inside(spans, s) for s in spans if s["name"] == "forward"]
    assert all("layer1.0" in names for names in forwards)


def test_spans_are_nested_and_ordered(folder):
    for spans in tracks_of(folder / "trace.json").values():
        assert_sound(spans)


def test_layers_keep_their_own_forward_and_a_trace_changes_no_bit(folder, tmp_path):
    recipe = tiny_recipe()
    plain = run_tiny(tmp_path, recipe, runtime=Runtime(precision="fp32", micro_batch_size=8))
    assert not (tmp_path / "trace.json").exists()
    weights = traced(tmp_path / "traced")
    for name, tensor in plain["weights"].items():
        assert torch.equal(tensor, weights[name])


def test_no_more_updates_than_there_are_before_the_evaluation_are_traced(tmp_path):
    run_tiny(
        tmp_path, tiny_recipe(), runtime=Runtime(precision="fp32", micro_batch_size=8, trace_steps=50), max_steps=3
    )
    names = [s["name"] for s in tracks_of(tmp_path / "trace.json")[0, "training"]]
    assert [name for name in names if name.startswith("update ")] == ["update 1", "update 2", "update 3"]


def _train(folder: str) -> None:
    traced(folder)


@pytest.mark.slow
def test_two_workers_are_in_one_file_with_a_track_for_each_bucket(tmp_path):
    run_processes(2, _train, str(tmp_path))
    tracks = tracks_of(tmp_path / "trace.json")
    assert {rank for rank, _ in tracks} == {0, 1}
    assert {track for _, track in tracks} >= {"training", "bucket 0", "bucket 1"}
    for spans in tracks.values():
        assert_sound(spans)
    for rank in (0, 1):
        bucket = tracks[rank, "bucket 0"]
        outer = [s for s in bucket if s["name"] == "bucket 0"]
        assert len(outer) == 2  # updates
        assert all(len(inside(bucket, s)) >= 3 for s in outer)  # with the stages of a torus
        updates = [s for s in tracks[rank, "training"] if s["name"].startswith("update ")]
        assert all("bucket 0" in inside(bucket, update) for update in updates)


def test_events_of_a_track_are_in_order_whatever_the_order_in_which_they_ended():
    inner, outer = TraceSpan("training", "layer", 2.0, 3.0, {}), TraceSpan("training", "update", 2.0, 4.0, {})
    other = TraceSpan("training", "update", 1.0, 1.5, {"images": 3})
    spans = [e for e in chrome_trace([[inner, outer], [other]])["traceEvents"] if e["ph"] == "X"]
    assert [(s["pid"], s["name"], s["ts"], s["dur"]) for s in spans] == [
        (0, "update", 1e6, 2e6),
        (0, "layer", 1e6, 1e6),
        (1, "update", 0.0, 5e5),
    ]
