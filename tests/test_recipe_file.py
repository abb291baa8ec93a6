"""Recipe files: TOML with every field, read back without loss; mistakes are named."""

import dataclasses
import tomllib

import pytest

from megabatch import recipes
from megabatch.errors import RecipeError
from megabatch.recipe import Recipe, fields_as_json
from megabatch.recipe_file import read_toml, to_toml


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_written_as_toml_is_read_back_equal(tmp_path, name):
    path = tmp_path / "mine.toml"
    path.write_text(to_toml(recipes.get(name), recipes.docstring(name)))
    assert read_toml(path) == recipes.get(name) == recipes.get(str(path))


def test_a_file_has_every_field_in_order_with_the_comments_of_the_class():
    recipe = recipes.get("mlperf_32768")
    text = to_toml(recipe, "two\nlines")
    assert list(tomllib.loads(text)) == [field.name for field in dataclasses.fields(Recipe)]
    assert text.startswith("# two\n# lines\n")
    assert "bn_span = 64  # samples per batch-norm statistic" in text.replace(f"= {recipe.bn_span} ", "= 64 ")
    assert "\n# Optimizer\noptimizer = " in text


def changed(tmp_path, old, new):
    path = tmp_path / "mine.toml"
    text = to_toml(recipes.get("fashion_mnist"))
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_numbers_keep_all_digits_and_whole_numbers_count_as_numbers(tmp_path):
    recipe = read_toml(changed(tmp_path, "momentum = 0.9\n", "momentum = 0.123456789012345  # mine\n"))
    assert recipe.momentum == 0.123456789012345
    assert read_toml(changed(tmp_path, "end_lr = 0.0", "end_lr = 1")).end_lr == 1.0
    assert read_toml(changed(tmp_path, "lr_factors = []", "lr_factors = [[0, 1], [5.5, 2]]")).lr_factors == (
        (0.0, 1.0),
        (5.5, 2.0),
    )


def test_fields_that_a_file_leaves_out_have_their_defaults(tmp_path):
    assert read_toml(changed(tmp_path, 'decay_epochs = "none"', "")).decay_epochs is None
    values = fields_as_json(read_toml(changed(tmp_path, "flip = true\n", "")))
    assert values["flip"] is True


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("momentum = 0.9\n", "lr = 2\n", "unknown recipe key 'lr'; did you mean peak_lr"),
        ("flip = true", "flip = 3", "flip=3: needed true or false"),
        ("momentum = 0.9\n", "momentum = true\n", "momentum=true: needed a number"),
        ("momentum = 0.9\n", "momentum = {a = 1}\n", "needed a number, true, false, a text, or a list"),
        ("momentum = 0.9\n", "momentum = 1.5\n", "momentum=1.5 was given, needed: in"),
        ("momentum = 0.9\n", "momentum = \n", "is not a TOML file"),
        ("bn_span = 128", "", "lacks 'bn_span'"),
        ('name = "fashion_mnist"', 'name = "../else"', "name=../else names the run folder"),
        ("lr_factors = []", "lr_factors = [[0, 1, 2]]", "lr_factors=0:1:2: needed"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_the_file(tmp_path, old, new, message):
    with pytest.raises(RecipeError) as caught:
        read_toml(changed(tmp_path, old, new))
    assert str(caught.value).startswith(str(tmp_path / "mine.toml"))
    assert message in str(caught.value)


def test_a_missing_file_says_how_to_write_one(tmp_path):
    with pytest.raises(RecipeError, match="--format toml"):
        recipes.get(str(tmp_path / "none.toml"))
