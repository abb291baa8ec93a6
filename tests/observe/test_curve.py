"""Comparison of an accuracy with a published curve: on, above or below."""

import pytest

from megabatch.observe.curve import against_curve, curve_text, published_at

CURVE = ((10.0, 0.10), (20.0, 0.30), (40.0, 0.70))


@pytest.mark.parametrize(
    ("epoch", "expected"), [(9.9, None), (10, 0.1), (15, 0.2), (20, 0.3), (30, 0.5), (40, 0.7), (55, 0.7)]
)
def test_the_curve_is_linear_between_points_and_constant_after_the_last(epoch: float, expected: float | None) -> None:
    assert published_at(CURVE, epoch) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("epoch", "top1", "verdict"),
    [
        (30, 0.504, "on"),
        (30, 0.496, "on"),
        (30, 0.51, "above"),
        (30, 0.49, "below"),
        (50, 0.69, "below"),
        (5, 0.05, None),  # before the first published point
        (5, 0.12, "above"),  # already at the accuracy of the first point
    ],
)
def test_the_verdict_compares_with_the_interpolated_point(epoch: float, top1: float, verdict: str | None) -> None:
    assert against_curve(CURVE, epoch, top1, tolerance=0.005) == verdict


def test_without_a_curve_the_result_is_none() -> None:
    assert against_curve((), 3, 0.5) is None
    assert curve_text((), 3, 0.5) == ""


def test_a_published_number_of_epochs_to_a_target_is_a_curve_of_one_point() -> None:
    to_target = ((56.0, 0.759),)
    assert against_curve(to_target, 52, 0.70) is None  # not due yet
    assert against_curve(to_target, 52, 0.76) == "above"  # earlier than published
    assert against_curve(to_target, 56, 0.757) == "on"
    assert against_curve(to_target, 60, 0.74) == "below"


def test_a_wider_tolerance_accepts_more() -> None:
    assert against_curve(CURVE, 30, 0.45, tolerance=0.01) == "below"
    assert against_curve(CURVE, 30, 0.45, tolerance=0.06) == "on"


def test_the_remark_names_the_published_value_and_its_epoch() -> None:
    assert curve_text(CURVE, 30, 0.4) == "below the published curve (0.500 at epoch 30)"
    assert curve_text(CURVE, 90, 0.8) == "above the published curve (0.700 at epoch 40)"
    assert curve_text(((56.0, 0.759),), 52, 0.76) == "above the published curve (0.759 at epoch 56)"
