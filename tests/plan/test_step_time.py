"""Step times: fits reproduce the single-node rows, more images or kernels never take less time."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabatch.plan.hardware import load_hardware
from megabatch.plan.layers import layers_of
from megabatch.plan.step_time import _fit_two, expected_maximum, speed_of, step_jitter

HARDWARE = load_hardware()
STACKS = sorted(HARDWARE.stack)
RESNET = layers_of("resnet50")


@pytest.mark.parametrize("name", [name for name in STACKS if HARDWARE.stack[name].rows])
def test_the_fit_reproduces_the_single_node_rows_within_4_percent(name):
    speed = speed_of(name, HARDWARE)
    for row in HARDWARE.stack[name].rows:
        waiting = 1 + step_jitter(HARDWARE) * expected_maximum(row.workers)
        images_per_s = row.batch / (speed.compute_s(RESNET, row.batch) * waiting)
        assert images_per_s == pytest.approx(row.images_per_s, rel=0.04)


@pytest.mark.parametrize("name", STACKS)
def test_no_stack_beats_its_roofline(name):
    assert 0 < speed_of(name, HARDWARE).share <= 1
    assert speed_of(name, HARDWARE).overhead_s >= 0


@given(name=st.sampled_from(STACKS), batch=st.integers(1, 512), more=st.integers(1, 512))
def test_more_images_take_more_time_but_not_more_per_image(name, batch, more):
    speed = speed_of(name, HARDWARE)
    small, large = speed.compute_s(RESNET, batch), speed.compute_s(RESNET, batch + more)
    assert small < large
    assert large / (batch + more) <= small / batch * (1 + 1e-9)


@given(a=st.floats(0.1, 10), b=st.floats(0.1, 10))
def test_the_fit_of_two_coefficients_finds_those_that_made_the_points(a, b):
    points = [(x, 3.0, a * x + 3.0 * b, 1.0) for x in (1.0, 2.0, 5.0)]
    assert _fit_two(points) == pytest.approx((a, b))


@pytest.mark.parametrize("count", [2, 8, 100])
def test_the_expected_maximum_is_that_of_simulated_normal_values(count):
    drawn = random.Random(0)
    maxima = [max(drawn.gauss(0, 1) for _ in range(count)) for _ in range(4000)]
    assert expected_maximum(count) == pytest.approx(statistics.fmean(maxima), abs=0.06)


def test_one_worker_waits_for_none():
    assert expected_maximum(1) == 0
