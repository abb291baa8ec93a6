"""The facts of a recipe: overrides with checked types, contradictions refused with a value that works."""

import dataclasses

import pytest

from megabatch import recipes
from megabatch.errors import RecipeError
from megabatch.recipe import differing_fields, fields_as_json, from_json, override, validate, value_at


@pytest.fixture
def recipe():
    return recipes.get("fashion_mnist")


def test_override_parses_each_type(recipe):
    changed = override(
        recipe,
        {
            "peak_lr": "2.5",
            "global_batch_size": "2_048",
            "flip": "false",
            "momentum_form": "inside",
            "resolution": "0:28,3:32",
            "decay_epochs": "none",
            "pixel_mean": "0.25",
        },
    )
    assert changed.peak_lr == 2.5
    assert changed.global_batch_size == 2048
    assert changed.flip is False
    assert changed.momentum_form == "inside"
    assert changed.resolution == ((0.0, 28.0), (3.0, 32.0))
    assert changed.decay_epochs is None
    assert changed.pixel_mean == (0.25,)


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("peak_lr", "abc", "needed a number"),
        ("peak_lr", "nan", "needed a finite number"),
        ("global_batch_size", "1.5", "needed a whole number"),
        ("flip", "maybe", "needed true or false"),
        ("optimizer", "adam", "needed one of lars"),
        ("resolution", "28,32", "epoch:value"),
        ("peek_lr", "1", "did you mean peak_lr"),
        ("momentum", "1.5", "in [0, 1)"),
        ("total_epochs", "0", "above 0"),
        ("warmup_epochs", "500", "shorter than total_epochs"),
        ("resolution", "5:28", "start at 0"),
    ],
)
def test_a_wrong_override_is_refused_with_what_was_needed(recipe, key, text, said):
    with pytest.raises(RecipeError) as refusal:
        override(recipe, {key: text})
    assert said in str(refusal.value)


def test_a_batch_that_does_not_divide_into_spans_is_refused_with_one_that_does(recipe):
    with pytest.raises(RecipeError, match="global_batch_size=") as refusal:
        override(recipe, {"global_batch_size": "1001"})
    works = int(str(refusal.value).rsplit("global_batch_size=", 1)[1].split()[0])
    assert override(recipe, {"global_batch_size": str(works)}).global_batch_size == works


def test_fewer_epochs_keep_the_shape_of_the_schedule(recipe):
    base = dataclasses.replace(recipe, total_epochs=10.0, warmup_epochs=2.0, resolution=((0.0, 24.0), (5.0, 28.0)))
    shorter = override(base, {"total_epochs": "5"})
    assert shorter.warmup_epochs == 1.0
    assert shorter.resolution == ((0.0, 24.0), (2.5, 28.0))
    assert override(base, {"total_epochs": "5", "warmup_epochs": "2"}).warmup_epochs == 2.0


def test_json_round_trip_is_exact(recipe):
    assert from_json(fields_as_json(recipe)) == recipe


def test_json_with_an_unknown_field_is_refused(recipe):
    with pytest.raises(RecipeError, match="unknown fields: colour"):
        from_json(fields_as_json(recipe) | {"colour": 1})


def test_json_with_a_missing_field_is_refused(recipe):
    values = fields_as_json(recipe)
    del values["peak_lr"]
    with pytest.raises(RecipeError, match="incomplete"):
        from_json(values)


def test_only_fields_that_reach_the_weights_count_as_different(recipe):
    other = dataclasses.replace(recipe, name="other", target_top1=0.5, peak_lr=recipe.peak_lr * 2)
    assert set(differing_fields(recipe, other)) == {"peak_lr"}


def test_value_at_takes_the_last_entry_that_has_begun():
    steps = ((0.0, 1.0), (30.0, 0.1))
    assert [value_at(steps, epoch) for epoch in (0.0, 29.99, 30.0, 90.0)] == [1.0, 1.0, 0.1, 0.1]


def test_growth_by_noise_scale_and_a_fixed_schedule_contradict(recipe):
    both = dataclasses.replace(
        recipe,
        batch_sizes=((0.0, float(recipe.global_batch_size)),),
        max_global_batch_size=recipe.global_batch_size * 4,
    )
    with pytest.raises(RecipeError, match="contradict"):
        validate(both)
