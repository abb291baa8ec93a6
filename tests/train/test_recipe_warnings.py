"""Warnings at the start of a run whose recipe suits its data badly."""

import dataclasses
import re

import pytest

from megabatch import recipes
from megabatch.recipe import Recipe, override
from megabatch.train.recipe_warnings import (
    batch_larger_than_data,
    too_few_updates_for_running_averages,
    warnings_for,
)


def updates(number: int, **changes: object) -> Recipe:
    """A recipe of so many equal updates, with running averages that forget over ten of them."""
    recipe = dataclasses.replace(recipes.get("fashion_mnist"), stats_momentum=0.1, warmup_epochs=0.0)
    epochs = number * recipe.global_batch_size / recipe.num_train_images
    return dataclasses.replace(recipe, total_epochs=epochs, **changes)


@pytest.mark.parametrize("eval_stats", ["running", "running_all_reduced"])
def test_a_last_tenth_that_is_shorter_than_the_averages_memory_is_warned_of(eval_stats):
    assert too_few_updates_for_running_averages(updates(100, eval_stats=eval_stats)) is None
    said = too_few_updates_for_running_averages(updates(99, eval_stats=eval_stats))
    assert "= 10 updates" in said
    assert "has 9.9" in said
    assert too_few_updates_for_running_averages(updates(100, eval_stats=eval_stats, stats_momentum=0.05)) is not None
    assert too_few_updates_for_running_averages(updates(20, eval_stats=eval_stats, stats_momentum=0.5)) is None


def test_what_the_warning_names_works():
    recipe = updates(10)
    settings = dict(re.findall(r"--set (\w+)=(\S+)", too_few_updates_for_running_averages(recipe)))
    assert settings == {"eval_stats": "precise", "precise_batches": "16"}
    assert too_few_updates_for_running_averages(override(recipe, settings)) is None


@pytest.mark.parametrize("eval_stats", ["precise", "last_batch"])
def test_statistics_that_are_not_averaged_over_updates_need_no_number_of_them(eval_stats):
    assert too_few_updates_for_running_averages(updates(3, eval_stats=eval_stats)) is None


def test_the_batch_at_the_end_decides_where_it_grows():
    assert too_few_updates_for_running_averages(updates(200, batch_sizes=((0.0, 1024.0), (1.0, 4096.0)))) is not None
    assert too_few_updates_for_running_averages(updates(50, batch_sizes=((0.0, 1024.0), (0.5, 128.0)))) is None


@pytest.mark.parametrize("name", recipes.names())
def test_no_recipe_needs_the_warning_as_it_is(name):
    assert warnings_for(recipes.get(name)) == []


@pytest.mark.parametrize("name", ["mlperf_4096", "mikami2018_34k_68k", "photos"])
@pytest.mark.parametrize("num_images", [7, 50, 500])
def test_a_batch_beyond_the_data_set_is_warned_of_with_values_that_work(name, num_images):
    recipe = dataclasses.replace(recipes.get(name), num_train_images=num_images)
    said = batch_larger_than_data(recipe)
    if name == "photos" and num_images == 500:
        assert said is None
        return
    assert f"larger than the data set of {num_images}" in said
    assert ("recipe photos" in said) == (name != "photos")
    assert said in warnings_for(recipe)
    settings = dict(re.findall(r"--set (\w+)=(\S+)", said))
    fitting = override(recipe, settings)
    assert batch_larger_than_data(fitting) is None
    assert num_images / 20 <= fitting.smallest_batch <= num_images / 5 or num_images < 10


def test_a_batch_as_large_as_the_data_set_is_not_warned_of():
    recipe = dataclasses.replace(recipes.get("photos"), num_train_images=64)
    assert batch_larger_than_data(recipe) is None
    assert batch_larger_than_data(dataclasses.replace(recipe, num_train_images=63)) is not None
