"""`Recipe`: typed overrides, validation with a working value in every message, JSON, batch sizes by epoch."""

import dataclasses

import pytest

from megabatch import recipes
from megabatch.errors import RecipeError
from megabatch.recipe import (
    Recipe,
    differing_fields,
    fields_as_json,
    from_json,
    override,
    read,
    value_at,
)
from megabatch.recipe_text import COMMON_NAMES
from megabatch.recipe_validation import validate


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
    ("key", "text", "expected"),
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
        ("pixel_mean", "124", "needed: of pixels in [0, 1]; pixel_mean=0.5 works"),
        ("pixel_std", "58", "in (0, 1]"),
        ("stem", "large", "needed: one of resnet8: auto, pooled; stem=auto works"),
        ("min_crop_aspect", "0", "above 0 and at most max_crop_aspect"),
        ("root_every_steps", "0", "needed: above 0; root_every_steps=10 works"),
        ("sgd_lr_factor", "-1", "0 or more"),
        ("muon_scale", "adam", "needed one of spectral"),
        ("decay", "step", "given when decay=step; lr_factors=0:1,30:0.1 works"),
    ],
)
def test_an_invalid_override_says_what_was_needed(recipe, key, text, expected):
    with pytest.raises(RecipeError) as raised:
        override(recipe, {key: text})
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("lr", "peak_lr"),
        ("batch", "global_batch_size"),
        ("batch_size", "global_batch_size"),
        ("epochs", "total_epochs"),
        ("wd", "weight_decay"),
        ("img_size", "resolution"),
        ("image_size", "resolution"),
        ("end_lrr", "end_lr"),
    ],
)
def test_an_unknown_key_suggests_the_field_of_that_common_name_or_the_nearest(recipe, key, field):
    with pytest.raises(RecipeError, match=rf"unknown recipe key '{key}'; did you mean {field}\?$"):
        override(recipe, {key: "1"})


def test_common_names_are_unknown_keys_and_stand_for_fields():
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert set(COMMON_NAMES.values()) <= fields
    assert not set(COMMON_NAMES) & fields


def test_an_unknown_key_without_a_near_name_points_to_the_list(recipe):
    with pytest.raises(RecipeError, match="`megabatch recipes NAME` shows every key"):
        override(recipe, {"zzz": "1"})


def test_the_batch_follows_its_schedule(recipe):
    grown = dataclasses.replace(recipe, batch_sizes=((0.0, 256.0), (3.0, 1024.0), (5.0, 512.0)))
    assert [grown.batch_at(epoch) for epoch in (0.0, 2.99, 3.0, 5.5)] == [256, 256, 1024, 512]
    assert (grown.smallest_batch, grown.largest_batch) == (256, 1024)


def test_without_a_schedule_the_batch_is_the_global_batch(recipe):
    fixed = dataclasses.replace(recipe, global_batch_size=384)
    assert (fixed.batch_at(0.0), fixed.batch_at(7.5), fixed.smallest_batch, fixed.largest_batch) == (384,) * 4


def test_a_batch_that_grows_with_the_noise_scale_can_reach_its_maximum(recipe):
    growing = dataclasses.replace(recipe, global_batch_size=128, max_global_batch_size=2048)
    assert (growing.batch_at(9.0), growing.smallest_batch, growing.largest_batch) == (128, 128, 2048)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("global_batch_size", "1001"),
        ("max_global_batch_size", "3000"),
        ("batch_sizes", "0:1024,2:1999"),
        ("bn_span", "96"),
    ],
)
def test_a_batch_that_is_not_a_multiple_of_the_span_is_rejected_with_one_that_is(recipe, key, text):
    with pytest.raises(RecipeError, match="does not divide into batch-norm spans") as raised:
        override(recipe, {key: text})
    suggested, value = str(raised.value).rsplit("; ", 1)[1].removesuffix(" works").split("=")
    override(recipe, {key: text} | {suggested: value})


def test_fewer_epochs_keep_the_shape_of_the_schedule(recipe):
    base = dataclasses.replace(recipe, total_epochs=10.0, warmup_epochs=2.0, resolution=((0.0, 24.0), (5.0, 28.0)))
    shorter = override(base, {"total_epochs": "5"})
    assert shorter.warmup_epochs == 1.0
    assert shorter.resolution == ((0.0, 24.0), (2.5, 28.0))
    assert override(base, {"total_epochs": "5", "warmup_epochs": "2"}).warmup_epochs == 2.0


def test_json_round_trip_is_exact(recipe):
    assert from_json(fields_as_json(recipe)) == recipe


def test_json_with_an_unknown_field_is_rejected(recipe):
    with pytest.raises(RecipeError, match="unknown fields: colour"):
        from_json(fields_as_json(recipe) | {"colour": 1})


def test_json_with_a_missing_field_is_rejected(recipe):
    values = fields_as_json(recipe)
    del values["peak_lr"]
    with pytest.raises(RecipeError, match="incomplete"):
        from_json(values)


def test_differing_fields_leave_out_descriptive_fields(recipe):
    other = dataclasses.replace(recipe, name="other", target_top1=0.5, peak_lr=recipe.peak_lr * 2)
    assert set(differing_fields(recipe, other)) == {"peak_lr"}


def test_value_at_uses_the_last_entry_that_has_started():
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


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": "0.9"},
        {"num_classes": 10.5},
        {"num_classes": True},
        {"seed": 2**64},
        {"peak_lr": float("nan")},
        {"peak_lr": 10**400},
        {"optimizer": "adam"},
        {"resolution": [[0, 28, 3]]},
        {"pixel_mean": {"a": 1}},
        {"decay_epochs": "none"},
    ],
)
def test_a_recipe_file_with_a_value_of_another_type_names_the_field(change):
    values = fields_as_json(recipes.get("fashion_mnist")) | change
    with pytest.raises(RecipeError, match=next(iter(change))):
        from_json(values)


@pytest.mark.parametrize(
    "settings",
    [
        {"total_epochs": "1e7"},
        {"total_epochs": "1e-9"},
        {"num_classes": "9" * 18},
        {"seed": "9" * 30},
        {"width": "1e3"},
    ],
)
def test_values_that_would_need_endless_time_or_memory_are_refused(settings):
    with pytest.raises(RecipeError, match=next(iter(settings))):
        override(recipes.get("fashion_mnist"), settings)


@pytest.mark.parametrize("content", ["", "[1]", "[" * 10**6, '{"name": 1}', "null"])
def test_a_file_that_is_no_recipe_is_an_error_of_ours(content, tmp_path):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(RecipeError):
        read(tmp_path / "recipe.json")
