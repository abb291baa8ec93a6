"""Every paper's recipe at its full global batch: real optimizer, schedule and spans; a small net on tiny images."""

import dataclasses
import math

import pytest
import torch
from ranks import run_processes
from slow import slow_except
from tiny_run import run_tiny

from megabatch import recipes
from megabatch.app.data import Data
from megabatch.data.sources.arrays import ArraySource
from megabatch.recipe import override
from megabatch.recipe_validation import validate
from megabatch.runtime import Runtime
from megabatch.train.schedule import settings_at

PAPERS = [name for name in recipes.names() if name.split("_")[0][-4:].isdecimal() and "mlperf" not in name]


def shrunk(name, **changes):
    """The recipe with a net of 20,000 parameters on 8 px images, over a data set of three global batches."""
    recipe = recipes.get(name)
    largest = max([recipe.global_batch_size, *(int(size) for _, size in recipe.batch_sizes)])
    small = {
        "model": "resnet8",
        "initialization": "he_fan_out",
        "width": 8,
        "resolution": ((0.0, 8.0),),
        "resolution_ramp": False,
        "eval_resolution": 8,
        "num_train_images": 3 * largest,
        "num_classes": 10,
    }
    return validate(dataclasses.replace(recipe, **small, **changes))


def made_data(recipe):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5_000, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (5_000,), generator=generator)
    repeats = math.ceil(recipe.num_train_images / 5_000)
    train = ArraySource(
        images.repeat(repeats, 1, 1, 1)[: recipe.num_train_images],
        labels.repeat(repeats)[: recipe.num_train_images],
        tuple("abcdefghij"),
    )
    return Data(train, ArraySource(images[:500], labels[:500], tuple("abcdefghij")), "made images")


def test_there_are_nine_papers_recipes():
    assert len(PAPERS) == 9


@pytest.mark.parametrize("name", slow_except(PAPERS, *set(PAPERS) - {"yamazaki2019_81k"}))  # tested below
def test_a_papers_recipe_takes_two_steps_at_its_full_global_batch(tmp_path, name):
    recipe = shrunk(name)
    span = recipe.bn_span
    runtime = Runtime(precision="fp32", micro_batch_size=max(1, 1024 // span) * span)
    result = run_tiny(tmp_path, recipe, runtime=runtime, max_steps=2, data=made_data(recipe))
    assert result["samples_seen"] == 2 * settings_at(recipe, 0, 0).count
    assert all(math.isfinite(loss) for loss in result["losses"])
    assert result["losses"][0] == pytest.approx(math.log(10), rel=0.2)


def train_some_steps(folder, name, micro_batch_size, num_steps):
    torch.set_num_threads(1)
    recipe = shrunk(name)
    runtime = Runtime(precision="fp32", micro_batch_size=micro_batch_size)
    return run_tiny(folder, recipe, runtime=runtime, max_steps=num_steps, data=made_data(recipe))


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_steps", slow_except([2, 3], 2))
def test_81920_samples_in_spans_of_40_train_the_same_on_one_worker_and_on_four(tmp_path, num_steps):
    assert recipes.get("yamazaki2019_81k").global_batch_size == 81_920
    assert recipes.get("yamazaki2019_81k").bn_span == 40
    alone = train_some_steps(tmp_path / "one", "yamazaki2019_81k", 1600, num_steps)
    four = run_processes(4, train_some_steps, tmp_path / "four", "yamazaki2019_81k", 800, num_steps)
    assert four[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(four[0]["weights"][name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def train_64_epochs_of_you(folder):
    torch.set_num_threads(1)
    recipe = override(recipes.get("you2017_resnet50_32k"), {"total_epochs": "64", "published_top1": "0.749"})
    small = {"model": "resnet8", "width": 8, "resolution": ((0.0, 8.0),), "eval_resolution": 8, "num_classes": 10}
    small |= {"global_batch_size": 64, "num_train_images": 192}
    recipe = validate(dataclasses.replace(recipe, **small))
    runtime = Runtime(precision="fp32", micro_batch_size=16)
    return run_tiny(folder, recipe, runtime=runtime, max_steps=4, data=made_data(recipe))


@pytest.mark.multiprocess
def test_the_64_epoch_run_of_you_trains_on_two_workers_what_one_trains(tmp_path):
    alone = train_64_epochs_of_you(tmp_path / "one")
    two = run_processes(2, train_64_epochs_of_you, tmp_path / "two")
    assert two[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert two[0]["samples_seen"] == 256
