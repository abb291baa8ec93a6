"""The weight average: half-life in epochs, buffers, swapping, state."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from megabatch.errors import UserError
from megabatch.optim.ema import WeightAverage


def scalar_model(value: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, value)
    return model


def averaged(model: nn.Module, average: WeightAverage) -> float:
    with average.swapped():
        return next(model.parameters()).item()


def test_updates_weigh_what_came_after_a_half_life_twice_as_much() -> None:
    """Values 1, 4, 7 one half-life apart: (1 + 2 * 4 + 4 * 7) / 7."""
    model = scalar_model()
    average = WeightAverage(model, half_life_epochs=0.5)
    for value in (1.0, 4.0, 7.0):
        nn.init.constant_(model.weight, value)
        average.update(step_epochs=0.5)
    assert averaged(model, average) == pytest.approx(37 / 7)


@given(value=st.floats(-10, 10), steps=st.lists(st.floats(1e-4, 2), min_size=1, max_size=20))
def test_constant_weights_stay(value: float, steps: list[float]) -> None:
    model = scalar_model(value)
    average = WeightAverage(model, half_life_epochs=0.3)
    for step in steps:
        average.update(step)
    assert averaged(model, average) == pytest.approx(value, abs=1e-12)


def test_half_the_steps_at_twice_the_batch_give_the_same_average_of_a_linear_trajectory() -> None:
    """The weights at epoch e are e; after 10 epochs with half-life 1 the average is 10 - 1 / ln 2, plus half a step."""
    values = []
    for steps_per_epoch in (1000, 500):
        model = scalar_model()
        average = WeightAverage(model, half_life_epochs=1.0)
        for step in range(1, 10 * steps_per_epoch + 1):
            nn.init.constant_(model.weight, step / steps_per_epoch)
            average.update(1 / steps_per_epoch)
        values.append(averaged(model, average))
    assert values[0] == pytest.approx(values[1], abs=1e-3)
    assert values[0] == pytest.approx(10 - 1.4427, abs=0.02)


def test_a_batch_that_doubles_in_mid_run_changes_nothing() -> None:
    values = []
    for steps in ([0.001] * 4000, [0.001] * 2000 + [0.002] * 1000):
        model = scalar_model()
        average = WeightAverage(model, half_life_epochs=0.5)
        epoch = 0.0
        for step in steps:
            epoch += step
            nn.init.constant_(model.weight, epoch)
            average.update(step)
        values.append(averaged(model, average))
    assert values[0] == pytest.approx(values[1], abs=1e-3)


def test_float_buffers_are_averaged_and_counters_copied() -> None:
    model = nn.BatchNorm1d(1)
    assert model.running_mean is not None
    assert model.num_batches_tracked is not None
    average = WeightAverage(model, half_life_epochs=1.0)
    for mean, count in ((3.0, 1), (6.0, 2)):
        model.running_mean.fill_(mean)
        model.num_batches_tracked.fill_(count)
        average.update(1.0)
    with average.swapped():
        assert model.running_mean.item() == pytest.approx(5)  # (3 + 2 * 6) / 3
        assert model.num_batches_tracked.item() == 2
    assert model.running_mean.item() == 6


def test_the_models_own_weights_are_restored_even_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    average = WeightAverage(model, half_life_epochs=1.0)
    average.update(0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), average.swapped():  # noqa: PT012
        model(torch.randn(8, 4))  # moves the running statistics
        nn.init.zeros_(model[0].weight)
        raise ZeroDivisionError
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_low_precision_weights_are_averaged_in_fp32() -> None:
    """Steps of 1 % of a half-life towards 1 + 1/128: bf16 has no values in between."""
    model = scalar_model(1.0, dtype=torch.bfloat16)
    average = WeightAverage(model, half_life_epochs=1.0)
    average.update(1.0)
    nn.init.constant_(model.weight, 1 + 1 / 128)
    for _ in range(100):
        average.update(0.01)
    held = average.state_dict()["tensors"]["weight"]
    assert held.dtype == torch.float32
    assert held.item() == pytest.approx(1 + 2 / 3 / 128, abs=1e-6)  # weights 1 and 0.5, as one half-life has passed


def test_a_model_that_is_moved_or_loaded_is_still_followed() -> None:
    model = nn.BatchNorm1d(2).float()
    average = WeightAverage(model, half_life_epochs=1.0)
    model.double()  # replaces the buffers by new tensors
    assert model.running_mean is not None
    model.running_mean.fill_(8.0)
    average.update(1.0)
    assert average.state_dict()["tensors"]["running_mean"].tolist() == [8, 8]


def test_save_and_load_changes_no_bit(tmp_path: Any) -> None:
    def run(model: nn.Module, average: WeightAverage, values: list[float]) -> None:
        for value in values:
            nn.init.constant_(model.weight, value)  # type: ignore[arg-type]
            average.update(0.1)

    whole = scalar_model()
    whole_average = WeightAverage(whole, half_life_epochs=0.25)
    run(whole, whole_average, [1.0, 3.0, -2.0, 0.5])
    first = scalar_model()
    first_average = WeightAverage(first, half_life_epochs=0.25)
    run(first, first_average, [1.0, 3.0])
    torch.save(first_average.state_dict(), tmp_path / "average.pt")
    run(first, first_average, [100.0])  # must not reach what was saved
    second = scalar_model()
    second_average = WeightAverage(second, half_life_epochs=0.25)
    second_average.load_state_dict(torch.load(tmp_path / "average.pt", weights_only=True))
    run(second, second_average, [-2.0, 0.5])
    assert averaged(second, second_average) == averaged(whole, whole_average)


def test_a_state_dict_is_a_copy() -> None:
    model = scalar_model(1.0)
    average = WeightAverage(model, half_life_epochs=1.0)
    average.update(1.0)
    saved = average.state_dict()
    nn.init.constant_(model.weight, 9.0)
    average.update(1.0)
    assert saved["tensors"]["weight"].item() == 1.0


def test_another_models_state_is_refused() -> None:
    average = WeightAverage(nn.Linear(2, 2), half_life_epochs=1.0)
    with pytest.raises(UserError, match="another model was given: bias"):
        average.load_state_dict(WeightAverage(nn.Linear(2, 2, bias=False), half_life_epochs=1.0).state_dict())


def test_a_state_that_holds_the_sums_of_span_layers_loads() -> None:
    average = WeightAverage(nn.Linear(2, 2), half_life_epochs=1.0)
    state = average.state_dict()
    state["tensors"] |= {"bn1.span_sum": torch.zeros(7), "bn1.first_span": torch.zeros(7)}
    average.load_state_dict(state)


def test_a_half_life_or_step_of_no_length_is_refused() -> None:
    with pytest.raises(UserError, match="half_life_epochs=0 was given"):
        WeightAverage(nn.Linear(2, 2), half_life_epochs=0)
    with pytest.raises(UserError, match="step_epochs=0 was given"):
        WeightAverage(nn.Linear(2, 2), half_life_epochs=1.0).update(0)
