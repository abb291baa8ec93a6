"""Every recipe is valid and documents the source of its numbers."""

import math
import re
import subprocess
import sys

import pytest
from limits import HANG_S

from megabatch import recipes
from megabatch.errors import RecipeError
from megabatch.recipe import fields_as_json, from_json, override
from megabatch.recipe_validation import validate

NAMES = recipes.names()
IMAGENET = (1_281_167, 1000)


def test_every_paper_and_every_mlperf_row_has_a_recipe() -> None:
    papers = {
        "you2017_alexnet_32k",
        "you2017_resnet50_32k",
        "akiba2017_32k",
        "mikami2018_34k_68k",
        "mikami2018_54k",
        "ying2018_32k",
        "ying2018_65k",
        "yamazaki2019_81k",
        "goyal2017_8k",
    }
    rows = (1632, 3264, 4096, 8192, 13_056, 32_768, 49_152, 58_880, 65_536, 67_840)
    assert papers | {f"mlperf_{row}" for row in rows} <= set(NAMES)
    assert {"fashion_mnist", "cifar10", "photos", "fast_16", "fast_32", "fast_88", "best_accuracy"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_has_its_name_and_round_trips_through_json(name: str) -> None:
    recipe = recipes.get(name)
    assert recipe.name == name
    assert validate(recipe) is recipe
    assert from_json(fields_as_json(recipe)) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_batch_norm_spans_divide_every_batch_of_the_run(name: str) -> None:
    recipe = recipes.get(name)
    epochs = [epoch for epoch, _ in recipe.batch_sizes] or [0.0]
    for batch in (recipe.global_batch_size, *map(recipe.batch_at, epochs)):
        assert batch % recipe.bn_span == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_shortened_to_one_epoch(name: str) -> None:
    short = override(recipes.get(name), {"total_epochs": "1"})
    assert short.warmup_epochs < 1
    assert all(epoch < 1 for epoch, _ in (*short.resolution, *short.batch_sizes))


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_gives_command_results_and_sources(name: str) -> None:
    summary = recipes.summary(name)
    assert summary.title
    assert summary.source
    assert summary.command.split()[:3] == ["megabatch", "train", name]
    assert ("--data" in summary.command) == (recipes.get(name).dataset in {"imagenet", "folder"})
    assert summary.published
    assert summary.measured == "not measured" or summary.measured_top1 is not None
    kinds = re.findall(r"^ {4}(\S[^:]*):", summary.sources, flags=re.MULTILINE)
    assert kinds
    assert {kind.split(",")[0].split(" ")[0] for kind in kinds} <= {"read", "recalled", "derived", "chosen", "departs"}


@pytest.mark.parametrize("name", NAMES)
def test_docstring_and_field_have_the_same_published_accuracy(name: str) -> None:
    recipe, summary = recipes.get(name), recipes.summary(name)
    if recipe.published_top1 is None:
        assert summary.published.startswith("nothing")
        return
    found = re.search(r"top-1 (0\.\d+)", summary.published)
    assert found is not None
    assert float(found[1]) == recipe.published_top1
    if recipe.published_curve:
        assert max(top1 for _, top1 in recipe.published_curve) >= recipe.published_top1


@pytest.mark.parametrize("name", [name for name in NAMES if recipes.get(name).dataset == "imagenet"])
def test_imagenet_recipes_have_the_right_counts(name: str) -> None:
    recipe = recipes.get(name)
    assert (recipe.num_train_images, recipe.num_classes) == IMAGENET


@pytest.mark.parametrize("name", [name for name in NAMES if re.search(r"\d+k", name)])
def test_a_batch_size_in_the_name_is_the_recipes(name: str) -> None:
    recipe = recipes.get(name)
    batches = [int(size) for _, size in recipe.batch_sizes] or [recipe.global_batch_size]
    named = [int(number) for number in re.findall(r"_(\d+)k", name)]
    assert all(
        batch // 1024 in {thousand, thousand - 1} or batch // 1000 == thousand
        for batch, thousand in zip(batches, named, strict=True)
    )
    assert f"{batches[0]:,}" in recipes.summary(name).title


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean akiba2017_32k"):
        recipes.get("akiba2018_32k")
    with pytest.raises(RecipeError, match="fashion_mnist works"):
        recipes.get("zzz")
    with pytest.raises(RecipeError, match="unknown recipe"):
        recipes.summary("Fashion")


def test_measured_top1_is_parsed_from_the_docstring() -> None:
    summary = recipes.Summary("", "", "", "", "top-1 0.9162 +- 0.0011 over 5 seeds, 160 s on 2 cores", "", "")
    assert summary.measured_top1 == 0.9162
    assert recipes.Summary("", "", "", "", "not measured", "", "").measured_top1 is None


def test_reading_every_recipe_does_not_import_torch() -> None:
    code = (
        "import sys; from megabatch import recipes\n"
        "for name in recipes.names(): recipes.get(name), recipes.summary(name)\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG_S)
    assert result.stdout.strip() == "False"


def test_rates_decay_and_crops_are_in_plausible_ranges() -> None:
    for name in NAMES:
        recipe = recipes.get(name)
        assert 0 < recipe.peak_lr <= 50
        assert recipe.end_lr < recipe.peak_lr
        assert 0 <= recipe.weight_decay <= 1e-3
        assert math.isclose(recipe.eval_crop_ratio, 0.875) or recipe.eval_crop_ratio >= 224 / 232
