"""Schedules by epoch: published tables, and continuity where two parts join."""

import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import HANG_S

from megabatch.errors import UserError
from megabatch.optim.schedule import (
    learning_rate,
    line_at,
    resolution_at,
    scaled_peak_lr,
    value_at,
)


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [(0, 0.1), (2.5, 1.65), (5, 3.2), (29.99, 3.2), (30, 0.32), (60, 0.032), (80, 0.0032), (90, 0.0032)],
)
def test_goyals_schedule_for_8192(epoch: float, lr: float) -> None:
    rate = learning_rate(
        epoch,
        peak_lr=3.2,
        total_epochs=90,
        warmup="linear",
        warmup_epochs=5,
        warmup_start_lr=0.1,
        decay="step",
        lr_factors=((0, 1), (30, 0.1), (60, 0.01), (80, 0.001)),
    )
    assert rate == pytest.approx(lr)


@pytest.mark.parametrize("epoch_lr", [(0, 6.4), (39.9, 6.4), (40, 0.96), (69.9, 0.96), (70, 0.128), (85, 0.0128)])
def test_akibas_slow_start_at_32k(epoch_lr: tuple[float, float]) -> None:
    epoch, lr = epoch_lr
    assert learning_rate(epoch, peak_lr=12.8, total_epochs=90, decay="slow_start") == pytest.approx(lr)
    assert learning_rate(epoch / 9, peak_lr=12.8, total_epochs=10, decay="slow_start") == pytest.approx(lr)


def test_fujitsus_polynomial_ends_before_the_run_does() -> None:
    """36 epochs of warm-up, 52 of decay with power 2.2 to 0.0325, then constant (MLPerf v0.6, open division)."""

    def lr(epoch: float) -> float:
        return learning_rate(
            epoch,
            peak_lr=13.0,
            total_epochs=90,
            warmup="linear",
            warmup_epochs=36,
            decay="poly",
            poly_power=2.2,
            end_lr=0.0325,
            decay_epochs=52,
        )

    assert lr(18) == pytest.approx(6.5)
    assert lr(36) == pytest.approx(13.0)
    assert lr(62) == pytest.approx(0.0325 + (13.0 - 0.0325) * 0.5**2.2)
    assert lr(88) == lr(90) == pytest.approx(0.0325)


def test_a_polynomial_that_counts_the_warmup_falls_where_the_warmup_ends() -> None:
    """Caffe: (1 - t / T)^p from the start, so at 10 of 100 epochs the rate drops from 32 to 32 * 0.81."""
    how: dict[str, Any] = {
        "peak_lr": 32.0, "total_epochs": 100, "decay": "poly", "warmup": "linear", "warmup_epochs": 10,
        "warmup_start_lr": 1.0,
    }  # fmt: skip
    assert learning_rate(10 - 1e-9, **how) == pytest.approx(32.0)
    assert learning_rate(10, decay_counts_warmup=True, **how) == pytest.approx(32 * 0.81)
    assert learning_rate(10, decay_counts_warmup=False, **how) == pytest.approx(32.0)
    assert learning_rate(55, decay_counts_warmup=True, **how) == pytest.approx(32 * 0.45**2)
    assert learning_rate(55, decay_counts_warmup=False, **how) == pytest.approx(32 * 0.5**2)
    for counts in (False, True):
        assert learning_rate(100, decay_counts_warmup=counts, **how) == 0


def test_a_decay_of_given_length_ends_at_the_same_epoch_whether_or_not_it_counts_the_warmup() -> None:
    for counts in (False, True):
        rates = [
            learning_rate(
                epoch, peak_lr=1.0, total_epochs=90, warmup="linear", warmup_epochs=10, decay="poly",
                decay_epochs=40, decay_counts_warmup=counts,
            )
            for epoch in (49.9, 50, 60)
        ]  # fmt: skip
        assert rates[0] > 0
        assert rates[1:] == [0, 0]


def test_cosine_passes_the_middle_at_half_time() -> None:
    rates = [
        learning_rate(
            epoch, peak_lr=2.0, total_epochs=110, warmup="linear", warmup_epochs=10, decay="cosine", end_lr=0.2
        )
        for epoch in (10, 35, 60, 110)
    ]
    assert rates == pytest.approx([2.0, 0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2, 1.1, 0.2])


def test_piecewise_interpolates_factors_of_the_peak_linearly() -> None:
    rates = [
        learning_rate(epoch, peak_lr=2.0, total_epochs=18, decay="piecewise", lr_factors=((0, 0.5), (2, 1), (18, 0)))
        for epoch in (0, 1, 2, 10, 18, 20)
    ]
    assert rates == pytest.approx([1.0, 1.5, 2.0, 1.0, 0.0, 0.0])


def test_constant_warmup_holds_the_start_rate_and_then_jumps() -> None:
    rates = [
        learning_rate(epoch, peak_lr=3.2, total_epochs=90, warmup="constant", warmup_epochs=5, warmup_start_lr=0.1)
        for epoch in (0, 4.99, 5)
    ]
    assert rates == [0.1, 0.1, 3.2]


def test_without_warmup_its_epochs_are_ignored() -> None:
    how: dict[str, Any] = {"peak_lr": 1.0, "total_epochs": 10, "decay": "poly"}
    assert learning_rate(2, warmup="none", warmup_epochs=5, **how) == learning_rate(2, **how) == pytest.approx(0.64)


JOINED = st.sampled_from(["constant", "poly", "cosine", "piecewise"])


@given(
    decay=JOINED,
    epoch=st.floats(0, 90),
    warmup_epochs=st.floats(0.5, 40),
    decay_epochs=st.none() | st.floats(20, 50),
    power=st.floats(1, 3),
    peak=st.floats(0.1, 40),
)
def test_the_rate_never_jumps(
    decay: Any, epoch: float, warmup_epochs: float, decay_epochs: float | None, power: float, peak: float
) -> None:
    """Over a millionth of an epoch the rate changes by less than 1e-5 of the peak, also where parts join."""
    how: dict[str, Any] = {
        "peak_lr": peak, "total_epochs": 90, "warmup": "linear", "warmup_epochs": warmup_epochs, "decay": decay,
        "decay_epochs": decay_epochs, "poly_power": power, "lr_factors": ((0, 1), (60, 1), (90, 0.1)),
    }  # fmt: skip
    for here in (epoch, warmup_epochs - 5e-7, 90 - 5e-7, (decay_epochs or 0) + warmup_epochs - 5e-7):
        before, after = learning_rate(here, **how), learning_rate(here + 1e-6, **how)
        assert abs(after - before) <= 1e-5 * peak


@given(
    decay=st.sampled_from(["constant", "poly", "cosine", "slow_start"]),
    epochs=st.tuples(st.floats(0, 120), st.floats(0, 120)),
    counts=st.booleans(),
)
def test_after_the_warmup_the_rate_never_rises_and_stays_within_its_bounds(
    decay: Any, epochs: tuple[float, float], counts: bool
) -> None:
    early, late = (
        learning_rate(
            10 + epoch, peak_lr=5.0, total_epochs=90, warmup="linear", warmup_epochs=10, decay=decay, end_lr=0.001,
            decay_counts_warmup=counts,
        )
        for epoch in sorted(epochs)
    )  # fmt: skip
    assert 5.0 >= early >= late >= 0.001


@pytest.mark.parametrize(("scaling", "lr"), [("none", 0.1), ("linear", 0.1 * 32), ("sqrt", 0.1 * math.sqrt(32))])
def test_the_peak_rate_follows_the_batch(scaling: Any, lr: float) -> None:
    scaled = scaled_peak_lr(0.1, scaling=scaling, global_batch_size=8192, reference_batch_size=256)
    assert scaled == pytest.approx(lr)


@pytest.mark.parametrize(
    ("batch", "lr"), [(512, 4), (1024, 5.657), (4096, 11.31), (8192, 16), (16384, 22.63), (32768, 32)]
)
def test_the_square_root_rule_of_lars_gives_the_published_rates(batch: int, lr: float) -> None:
    scaled = scaled_peak_lr(4.0, scaling="sqrt", global_batch_size=batch, reference_batch_size=512)
    assert scaled == pytest.approx(lr, rel=1e-3)


def test_resolution_jumps_or_ramps_in_multiples_of_32() -> None:
    sizes = ((0, 128), (6, 160), (13, 192))
    assert [resolution_at(e, sizes) for e in (0, 5.9, 6, 12.9, 13, 18)] == [128, 128, 160, 160, 192, 192]
    wide = ((0, 128), (10, 224))
    assert [resolution_at(e, wide, ramp=True) for e in (0, 1, 2, 5, 9, 10, 12)] == [128, 128, 160, 192, 224, 224, 224]
    assert resolution_at(3, ((0, 28),), ramp=True) == 28


@given(
    sizes=st.lists(st.integers(32, 300), min_size=1, max_size=5),
    epoch=st.floats(0, 100),
    ramp=st.booleans(),
)
def test_resolution_is_always_within_the_schedules_range(sizes: list[int], epoch: float, ramp: bool) -> None:
    schedule = tuple((10.0 * index, size) for index, size in enumerate(sizes))
    assert min(sizes) <= resolution_at(epoch, schedule, ramp=ramp) <= max(sizes)


def test_values_and_lines_are_constant_outside_their_entries() -> None:
    entries = ((2.0, 5.0), (4.0, 9.0))
    assert [value_at(entries, e) for e in (0, 2, 3, 4, 9)] == [5, 5, 5, 9, 9]
    assert [line_at(entries, e) for e in (0, 2, 3, 4, 9)] == [5, 5, 7, 9, 9]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": -0.1}, "epoch=-0.1 was given"),
        ({"decay": "slowly"}, "decay=poly works"),
        ({"warmup": "hot"}, "warmup=linear works"),
        ({"decay": "step"}, "decay=step needs lr_factors"),
        ({"decay": "piecewise"}, "decay=piecewise needs lr_factors"),
    ],
)
def test_invalid_values_are_refused_with_an_example(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        learning_rate(**{"epoch": 1.0, "peak_lr": 1.0, "total_epochs": 90, **values})
    with pytest.raises(UserError, match="scaling=linear works"):
        scaled_peak_lr(1.0, scaling="cubic", global_batch_size=2, reference_batch_size=1)  # type: ignore[arg-type]


def test_schedules_import_without_torch() -> None:
    code = (
        "import sys; import megabatch.optim.batch_size; "
        "from megabatch import learning_rate, GradientNoiseScale; "
        "assert learning_rate(1.0, peak_lr=2.0, total_epochs=3) == 2.0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=HANG_S)
