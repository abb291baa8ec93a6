"""Number of steps of a run whose batch changes."""

import dataclasses
import random

import pytest

from megabatch import recipes
from megabatch.recipe import Recipe
from megabatch.train.schedule import count_steps, total_samples


def walk(recipe: Recipe) -> int:
    """Counts the steps one by one, as the training loop takes them."""
    steps = first = 0
    while first < total_samples(recipe):
        first += recipe.batch_at(first / recipe.num_train_images)
        steps += 1
    return steps


@pytest.mark.parametrize("name", recipes.names())
def test_the_steps_of_a_recipe_are_those_of_the_loop(name):
    assert count_steps(recipes.get(name)) == walk(recipes.get(name))


@pytest.mark.parametrize("seed", range(30))
def test_the_steps_of_a_batch_schedule_are_those_of_the_loop(seed):
    rng = random.Random(seed)
    starts = [0.0, *sorted({round(rng.uniform(0.1, 5), rng.choice([1, 9])) for _ in range(3)})]
    recipe = dataclasses.replace(
        recipes.get("fashion_mnist"),
        num_train_images=rng.choice([777, 60_000]),
        total_epochs=rng.choice([1.3, 3.3, 5.0]),
        batch_sizes=tuple((start, float(rng.randint(1, 900))) for start in starts),
    )
    assert count_steps(recipe) == walk(recipe)
