"""What is said at the start of a run that has too few updates for batch norm's running averages."""

import dataclasses
import re

import pytest

from megabatch import recipes
from megabatch.recipe import Recipe, override
from megabatch.train.recipe_warnings import too_few_updates_for_running_averages


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
    assert too_few_updates_for_running_averages(recipes.get(name)) is None
