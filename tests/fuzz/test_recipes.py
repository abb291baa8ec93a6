"""Malformed recipes and overrides: a consistent recipe, or RecipeError."""

import dataclasses
import itertools
import json
import random
import re

import pytest
from mutations import NUMBERS, TEXTS, mutate_json_text, run_cases
from slow import slow_except

from megabatch import recipes
from megabatch.cli.recipes import curve
from megabatch.recipe import Recipe, differing_fields, fields_as_json, override, read
from megabatch.recipe_text import as_text
from megabatch.train.schedule import count_steps, settings_at

FIELDS = [field.name for field in dataclasses.fields(Recipe)]
COUNTS = slow_except([200, 1000], 200)


def use(recipe: Recipe) -> bool:
    """Computes what a run reads from a recipe before its first step."""
    assert count_steps(recipe) >= 1
    assert settings_at(recipe, step=0, first=0).count >= 1
    assert recipe.largest_batch >= recipe.smallest_batch >= 1
    assert len(curve(recipe, num_points=50)) == 50
    json.dumps(fields_as_json(recipe), allow_nan=False)
    return True


def text(rng: random.Random, current: object) -> str:
    """The text of a field's value with one number changed, or a text of any kind."""
    if rng.random() < 0.7:
        return re.sub(
            r"[\d.]+",
            lambda match: rng.choice([match[0], match[0] + "0", f"{rng.uniform(0, 20):g}", "1"]),
            as_text(current),
        )
    parts = [rng.choice([rng.choice(NUMBERS), rng.choice(TEXTS), str(rng.uniform(-2, 400))]) for _ in range(3)]
    joints = rng.choices([":", ",", ""], k=2)
    return rng.choice([parts[0], "".join(map("".join, itertools.zip_longest(parts, joints, fillvalue="")))])


@pytest.mark.parametrize("count", COUNTS)
def test_overrides(count):
    def case(rng):
        recipe = recipes.get(rng.choice(recipes.names()))
        keys = rng.sample(FIELDS, rng.randint(1, 3))
        return use(override(recipe, {key: text(rng, getattr(recipe, key)) for key in keys}))

    outcomes = run_cases("recipe overrides", count, case)
    assert min(outcomes["accepted"], outcomes["refused"]) > count / 50


@pytest.mark.parametrize("count", COUNTS)
def test_recipe_files(count, tmp_path):
    path = tmp_path / "recipe.json"

    def case(rng):
        original = recipes.get(rng.choice(recipes.names()))
        path.write_bytes(mutate_json_text(json.dumps(fields_as_json(original)), rng))
        differing_fields(original, read(path))
        return use(read(path))

    outcomes = run_cases("recipe files", count, case)
    assert min(outcomes["accepted"], outcomes["refused"]) > count / 50
