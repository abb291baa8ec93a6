"""Early stopping: a run ends after so many epochs without a better top-1, also when it is resumed in between."""

import dataclasses
import itertools

import pytest
from tiny_run import run_tiny, tiny_recipe

from megabatch.observe.events import read_events
from megabatch.runtime import Runtime
from megabatch.train.state import Evaluation

FP32 = Runtime(precision="fp32", micro_batch_size=8)


def recipe(**changes):
    return tiny_recipe(total_epochs=8.0, num_train_images=48, **changes)


@pytest.fixture
def evaluations(monkeypatch):
    """Sets the correct answers, of 100, of the evaluations of one run, at epochs 1, 2, ..."""

    def give(*correct):
        counts = itertools.chain(correct)
        monkeypatch.setattr("megabatch.train.loop.evaluate_run", lambda _: Evaluation(100, next(counts), 100, 1.0))

    return give


@pytest.mark.parametrize(
    ("changes", "correct", "epochs"),
    [
        ({}, (50, 40, 40, 40, 40, 40, 40, 40), 8),  # 0 means no rule
        ({"early_stop_epochs": 2.0}, (50, 50, 40), 3),  # an equal top-1 is not better
        ({"early_stop_epochs": 2.0}, (50, 40, 60, 40, 40), 5),
        ({"early_stop_epochs": 2.0}, (50, 40, 60, 40, 61, 40, 62, 63), 8),
        ({"early_stop_epochs": 2.0, "early_stop_min_rise": 0.05}, (50, 54, 54), 3),
        ({"early_stop_epochs": 2.0, "early_stop_min_rise": 0.05}, (50, 54, 56, 40, 40), 5),
        ({"early_stop_epochs": 1.0}, (0, 0), 2),  # the first evaluation counts, whatever it is
        ({"early_stop_epochs": 3.0, "eval_every_epochs": 2.0}, (50, 40, 40), 6),  # found at the next evaluation
    ],
)
def test_a_run_ends_after_so_many_epochs_without_a_better_top1(tmp_path, evaluations, changes, correct, epochs):
    evaluations(*correct)
    assert run_tiny(tmp_path, recipe(**changes), runtime=FP32)["samples_seen"] == 48 * epochs
    stops = [event for event in read_events(tmp_path / "events.jsonl") if event["event"] == "early_stop"]
    assert len(stops) == (epochs < 8)


def test_a_resumed_run_stops_where_an_uninterrupted_one_does_and_stays_stopped(tmp_path, evaluations):
    rule, resuming = recipe(early_stop_epochs=2.0), dataclasses.replace(FP32, resume=True)
    evaluations(50, 40, 40, 40)
    run_tiny(tmp_path, rule, runtime=FP32, max_steps=2)  # 2 epochs, with evaluations after 1 and 2
    assert run_tiny(tmp_path, rule, runtime=resuming)["samples_seen"] == 48 * 3
    again = run_tiny(tmp_path, rule, runtime=resuming)
    assert (again["samples_seen"], again["losses"]) == (48 * 3, [])


def test_a_longer_patience_continues_a_stopped_run(tmp_path, evaluations):
    evaluations(50, 40, 40, 60, 40)
    run_tiny(tmp_path, recipe(early_stop_epochs=1.0), runtime=FP32)
    longer = recipe(early_stop_epochs=3.0)
    result = run_tiny(tmp_path, longer, runtime=dataclasses.replace(FP32, resume=True), max_steps=2)
    assert result["samples_seen"] == 48 * 4
