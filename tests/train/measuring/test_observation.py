"""Measurements in the events of a run: phases add up, norms and trust ratios equal their equations."""

import math
from collections import Counter

import pytest
import torch
from tiny_run import run_tiny, tiny_recipe

from megabatch.observe.events import read_events
from megabatch.train.measuring.step_clock import StepClock


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_tiny(folder, tiny_recipe(weight_decay=0.01))
    return read_events(folder / "events.jsonl")


def test_the_phases_of_a_step_are_complete_and_fit_into_it(events):
    for step in (event for event in events if event["event"] == "step"):
        assert list(step["phases_s"]) == ["input", "forward", "backward", "exchange", "update"]
        assert 0 < sum(step["phases_s"].values()) <= step["step_s"] * 1.001 + 1e-5
        assert step["step_s"] == pytest.approx(48 / step["images_per_s"])


def test_training_accuracy_is_a_share_of_the_global_batch(events):
    shares = [event["train_top1"] for event in events if event["event"] == "step"]
    assert all((48 * share) == pytest.approx(round(48 * share)) for share in shares)
    assert shares[-1] > 0.5 > shares[0]


def test_norms_and_trust_ratios_follow_the_equation_of_lars(events):
    (observed,) = [event for event in events if event["event"] == "observation"]
    assert observed["step"] == 1
    for layer in observed["layers"].values():
        weight, grad = layer["weight_norm"], layer["grad_norm"]
        assert layer["trust_ratio"] == pytest.approx(0.03 * weight / (grad + 0.01 * weight), rel=1e-3)
    assert observed["grad_norm"] >= math.hypot(*(layer["grad_norm"] for layer in observed["layers"].values()))
    assert observed["peak_host_bytes"] > 2**20
    assert Counter(name for _, name, _, _ in observed["spans"])["update"] == 1


def test_the_confusion_matrix_counts_every_sample_and_its_diagonal_is_the_accuracy(events):
    last = [event for event in events if event["event"] == "evaluation"][-1]
    matrix = torch.tensor(last["confusion"])
    assert matrix.shape == (4, 4)
    assert matrix.sum() == last["num_samples"] == 100
    assert matrix.diagonal().sum() / 100 == pytest.approx(last["top1"])


def test_a_clock_sums_the_intervals_of_a_phase():
    clock = StepClock(torch.device("cpu"))
    for phase in ("input", "forward", "input"):
        clock.mark(phase)
    first, second, third = clock.spans()
    assert (first.start_s, second.start_s) == (0.0, first.length_s)
    assert clock.seconds() == pytest.approx({"input": first.length_s + third.length_s, "forward": second.length_s})
