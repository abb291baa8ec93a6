"""Intervals of a run: their forms, and when a multiple of one is crossed."""

import itertools

import pytest

from megabatch.errors import SettingsError
from megabatch.runtime import Interval, Runtime, parse_interval


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("100steps", Interval(steps=100)),
        ("1step", Interval(steps=1)),
        ("0.5epochs", Interval(epochs=0.5)),
        ("1epoch", Interval(epochs=1.0)),
        ("90s", Interval(seconds=90.0)),
        ("10min", Interval(seconds=600.0)),
        ("1.5 h", Interval(seconds=5400.0)),
        ("never", Interval()),
    ],
)
def test_each_form_is_read(text, interval):
    assert parse_interval("--checkpoint-every", text) == interval


@pytest.mark.parametrize("text", ["", "100", "0steps", "1.5steps", "-1s", "10 minutes", "1s 2s", "nan s", "0s"])
def test_another_form_is_refused_with_one_that_works(text):
    with pytest.raises(SettingsError, match=r"--checkpoint-every .*; --checkpoint-every 10min works"):
        Runtime(checkpoint_every=text)


def test_a_multiple_is_crossed_once_whatever_the_size_of_a_step():
    every = Interval(epochs=0.5)
    ends = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.9, 2.4]
    crossed = [every.crossed(before, after) for before, after in itertools.pairwise(ends)]
    assert crossed == [False, False, True, False, True, True, True]
    assert not Interval().crossed(0.0, 100.0)
    assert not Interval(seconds=1.0).crossed(0.0, 100.0)
