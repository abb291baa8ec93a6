"""The timeline's arithmetic, on given stamps."""

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
        "stages": [],
    }


def test_the_stages_of_a_bucket_are_reported_and_forgotten():
    timeline = Timeline()
    two_buckets(timeline)
    stages = [(0, "ReduceScatter row", 10.001, 10.030), (1, "ReduceScatter row", 10.021, 10.045)]
    assert timeline.finish_step()["stages"] == stages
    assert timeline.finish_step()["stages"] == []


def test_stamps_on_the_host_grow():
    assert stamp(CPU) <= stamp(CPU)
