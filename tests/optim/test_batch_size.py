"""Batch-size control: the schedule, lr and momentum after a change, growth by noise scale."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabatch.errors import UserError
from megabatch.optim.batch_size import NoiseScaleBatchPolicy, adjusted

IMAGENET = 1_281_167


def change(
    rule: Any, *, lr: float = 0.4, momentum: float = 0.9, batch: int, base_batch: int = 2048
) -> tuple[float, float]:
    return adjusted(lr, momentum, batch=batch, base_batch=base_batch, rule=rule, num_train_images=IMAGENET)


def test_each_rule_follows_its_equation() -> None:
    assert change("fixed", batch=8192) == (0.4, 0.9)
    assert change("linear", batch=8192) == pytest.approx((1.6, 0.9))
    assert change("sqrt", batch=8192) == pytest.approx((0.8, 0.9))
    assert change("noise_scale", batch=8192) == pytest.approx((0.4, 0.975))


@given(lr=st.floats(1e-4, 50), momentum=st.floats(0, 0.95), base=st.integers(1, 10_000), growth=st.floats(1.0, 5.0))
def test_the_noise_scale_rule_keeps_the_noise_scale(lr: float, momentum: float, base: int, growth: float) -> None:
    """Smith and Le: lr n / (B (1 - M)) before and after."""
    batch = math.ceil(base * growth)
    _, after = adjusted(
        lr, momentum, batch=batch, base_batch=base, rule="noise_scale", num_train_images=50_000, max_momentum=0.9999
    )
    assert lr * 50_000 / (batch * (1 - after)) == pytest.approx(lr * 50_000 / (base * (1 - momentum)), rel=1e-6)


@pytest.mark.parametrize("rule", ["fixed", "linear", "sqrt", "noise_scale"])
def test_at_the_base_batch_no_rule_changes_anything(rule: Any) -> None:
    assert change(rule, batch=2048) == pytest.approx((0.4, 0.9))


def test_the_momentum_stays_within_its_bounds() -> None:
    assert change("noise_scale", batch=2048 * 100)[1] == 0.99
    assert change("noise_scale", momentum=0.5, batch=512)[1] == 0.0
    assert change("noise_scale", lr=0.0, batch=8192) == (0.0, 0.9)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(UserError, match="rule=linear works"):
        change("cubic", batch=4096)


def norms_for(noise_scale: float, *, local: int, batch: int) -> tuple[float, float, float, float]:
    """Expected squared norms for |G|^2 = 1 and tr(Sigma) = noise_scale."""
    return 1 + noise_scale / local, local, 1 + noise_scale / batch, batch


def grow(policy: NoiseScaleBatchPolicy, noise_scale: float, steps: int) -> list[int]:
    return [policy.observe(*norms_for(noise_scale, local=16, batch=policy.global_batch_size)) for _ in range(steps)]


def test_the_batch_doubles_up_to_the_noise_scale_and_no_further() -> None:
    policy = NoiseScaleBatchPolicy(256, unit=32, max_batch_size=100_000, min_steps_between=10)
    sizes = grow(policy, noise_scale=2200.0, steps=100)
    assert sorted(set(sizes)) == [256, 512, 1024, 2048]
    assert [sizes.index(size) for size in (512, 1024, 2048)] == [9, 19, 29]


def test_hysteresis_asks_for_more_than_the_next_batch() -> None:
    """Next batch 512: an estimate of 530 is within 5 %, one of 540 is not."""
    for noise_scale, grows in ((530.0, False), (540.0, True)):
        policy = NoiseScaleBatchPolicy(256, max_batch_size=512, min_steps_between=1)
        assert (grow(policy, noise_scale, 5)[-1] == 512) is grows


def test_the_batch_never_exceeds_its_maximum_and_stays_a_multiple_of_the_unit() -> None:
    policy = NoiseScaleBatchPolicy(96, unit=32, max_batch_size=500, min_steps_between=1)
    assert sorted(set(grow(policy, 1e6, 20))) == [192, 384, 480]


@given(scales=st.lists(st.floats(1, 1e5), min_size=1, max_size=40))
def test_the_batch_never_shrinks(scales: list[float]) -> None:
    policy = NoiseScaleBatchPolicy(64, unit=16, max_batch_size=4096, min_steps_between=2, decay=0.5)
    sizes = [64] + [grow(policy, scale, 1)[0] for scale in scales]
    assert sizes == sorted(sizes)
    assert all(size % 16 == 0 and size <= 4096 for size in sizes)


def test_steps_without_a_usable_estimate_change_nothing() -> None:
    policy = NoiseScaleBatchPolicy(64, max_batch_size=4096, min_steps_between=1)
    for _ in range(5):
        assert policy.observe(1.0, 16, 1.1, 64) == 64  # noise below 0
        assert policy.observe(math.nan, 16, math.inf, 64) == 64


def test_save_and_load_continues_as_if_nothing_had_happened() -> None:
    whole = NoiseScaleBatchPolicy(64, max_batch_size=4096, min_steps_between=7)
    expected = grow(whole, 3000.0, 30)
    first = NoiseScaleBatchPolicy(64, max_batch_size=4096, min_steps_between=7)
    sizes = grow(first, 3000.0, 11)
    second = NoiseScaleBatchPolicy(64, max_batch_size=4096, min_steps_between=7)
    second.load_state_dict(first.state_dict())
    assert sizes + grow(second, 3000.0, 19) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"global_batch_size": 100, "unit": 32}, "global_batch_size=96 works"),
        ({"growth": 1.0}, "growth=1.0"),
        ({"hysteresis": -0.1}, "hysteresis=-0.1"),
    ],
)
def test_invalid_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NoiseScaleBatchPolicy(**{"global_batch_size": 64, "max_batch_size": 128, **values})
