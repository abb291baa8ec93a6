"""Every recipe is complete, fits together, and says where its numbers are from."""

import math
import re
import subprocess
import sys

import pytest

from megabatch import recipes
from megabatch.errors import RecipeError
from megabatch.recipe import fields_as_json, from_json, override, validate

NAMES = recipes.names()
IMAGENET = (1_281_167, 1000)


def test_all_that_the_papers_and_mlperf_publish_is_here() -> None:
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
def test_a_recipe_is_valid_bears_its_name_and_survives_json(name: str) -> None:
    recipe = recipes.get(name)
    assert recipe.name == name
    assert validate(recipe) is recipe
    assert from_json(fields_as_json(recipe)) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_batch_norm_spans_divide_every_batch_of_the_run(name: str) -> None:
    recipe = recipes.get(name)
    for batch in (recipe.global_batch_size, *(int(size) for _, size in recipe.batch_sizes)):
        assert batch % recipe.bn_span == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_can_be_shortened_to_one_epoch(name: str) -> None:
    short = override(recipes.get(name), {"total_epochs": "1"})
    assert short.warmup_epochs < 1
    assert all(epoch < 1 for epoch, _ in (*short.resolution, *short.batch_sizes))


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_says_command_result_and_the_source_of_every_number(name: str) -> None:
    told = recipes.summary(name)
    assert told.title
    assert told.source
    assert told.command.split()[:3] == ["megabatch", "train", name]
    assert ("--data" in told.command) == (recipes.get(name).dataset in {"imagenet", "folder"})
    assert told.published
    assert told.measured == "not measured" or told.measured_top1 is not None
    kinds = re.findall(r"^ {4}(\S[^:]*):", told.sources, flags=re.MULTILINE)
    assert kinds
    assert {kind.split(",")[0].split(" ")[0] for kind in kinds} <= {"read", "recalled", "derived", "chosen", "departs"}


@pytest.mark.parametrize("name", NAMES)
def test_the_published_accuracy_in_the_docstring_is_that_of_the_field(name: str) -> None:
    recipe, told = recipes.get(name), recipes.summary(name)
    if recipe.published_top1 is None:
        assert told.published.startswith("nothing")
        return
    found = re.search(r"top-1 (0\.\d+)", told.published)
    assert found is not None
    assert float(found[1]) == recipe.published_top1
    if recipe.published_curve:
        assert max(top1 for _, top1 in recipe.published_curve) >= recipe.published_top1


@pytest.mark.parametrize("name", [name for name in NAMES if recipes.get(name).dataset == "imagenet"])
def test_imagenet_is_counted_right(name: str) -> None:
    recipe = recipes.get(name)
    assert (recipe.num_train_images, recipe.num_classes) == IMAGENET


@pytest.mark.parametrize("name", [name for name in NAMES if re.search(r"\d+k", name)])
def test_a_name_with_a_batch_in_it_tells_the_batch(name: str) -> None:
    recipe = recipes.get(name)
    batches = [int(size) for _, size in recipe.batch_sizes] or [recipe.global_batch_size]
    named = [int(number) for number in re.findall(r"_(\d+)k", name)]
    assert all(
        batch // 1024 in {thousand, thousand - 1} or batch // 1000 == thousand
        for batch, thousand in zip(batches, named, strict=True)
    )
    assert f"{batches[0]:,}" in recipes.summary(name).title


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean akiba2017_32k"):
        recipes.get("akiba2018_32k")
    with pytest.raises(RecipeError, match="fashion_mnist works"):
        recipes.get("zzz")
    with pytest.raises(RecipeError, match="unknown recipe"):
        recipes.summary("Fashion")


def test_what_is_measured_is_read_from_the_docstring() -> None:
    told = recipes.Summary("", "", "", "", "top-1 0.9162 +- 0.0011 over 5 seeds, 160 s on 2 cores", "", "")
    assert told.measured_top1 == 0.9162
    assert recipes.Summary("", "", "", "", "not measured", "", "").measured_top1 is None


def test_importing_and_reading_every_recipe_leaves_torch_out() -> None:
    code = (
        "import sys; from megabatch import recipes\n"
        "for name in recipes.names(): recipes.get(name), recipes.summary(name)\n"
        "print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "False"


def test_crops_and_rates_are_within_reason() -> None:
    for name in NAMES:
        recipe = recipes.get(name)
        assert 0 < recipe.peak_lr <= 50
        assert recipe.end_lr < recipe.peak_lr
        assert 0 <= recipe.weight_decay <= 1e-3
        assert math.isclose(recipe.eval_crop_ratio, 0.875) or recipe.eval_crop_ratio >= 224 / 232
