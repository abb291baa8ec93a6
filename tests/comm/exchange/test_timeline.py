"""The timeline's arithmetic, on given stamps, and its trace."""

import json

import pytest
import torch

from megabatch.comm.exchange.timeline import Timeline, stamp

CPU = torch.device("cpu")


def two_buckets(timeline):
    for index, (ready, sent, done) in enumerate([(10.0, 10.001, 10.030), (10.020, 10.021, 10.045)]):
        bucket = timeline.ready(index, 1000, 500.0, CPU)
        bucket.ready, bucket.sent, bucket.done = ready, sent, done
        bucket.phases.append(("ReduceScatter row", sent, done))


def test_exposed_communication_is_what_follows_the_last_gradient():
    timeline = Timeline()
    two_buckets(timeline)
    step = timeline.finish_step()
    assert step["exposed_ms"] == pytest.approx(25.0)
    assert step["num_buckets"] == 2
    assert step["bytes_on_wire"] == 1000
    assert step["buckets"][1] == pytest.approx(
        {"index": 1, "numel": 1000, "ready_ms": 20.0, "sent_ms": 21.0, "done_ms": 45.0}
    )


def test_a_step_without_exchange_is_all_zero():
    assert Timeline().finish_step() == {
        "first_ready_s": 0.0,
        "exposed_ms": 0.0,
        "num_buckets": 0,
        "bytes_on_wire": 0,
        "buckets": [],
    }


def test_the_trace_holds_buckets_and_phases_of_the_last_steps(tmp_path):
    timeline = Timeline(keep_steps=2)
    for _ in range(5):
        two_buckets(timeline)
        timeline.finish_step()
    timeline.to_chrome_trace(tmp_path / "trace.json", rank=3)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 2 * 2 * 2
    assert {span["pid"] for span in spans} == {3}
    first = next(span for span in spans if span["name"] == "bucket 0")
    assert first["dur"] == pytest.approx(30_000, rel=1e-3)
    assert {span["name"] for span in spans} == {"bucket 0", "bucket 1", "ReduceScatter row"}


def test_stamps_on_the_host_grow():
    assert stamp(CPU) <= stamp(CPU)
