"""Both loaders refuse arguments that cannot be meant, and accept those of every recipe."""

import contextlib
import itertools
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from photographs import TEST_PHOTOS

from megabatch import recipes
from megabatch.app.data import build_eval_loader, build_train_loader
from megabatch.comm.launch import World
from megabatch.data.loading.eval_loader import EvalLoader
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.sources.arrays import ArraySource
from megabatch.data.sources.folder import FolderSource
from megabatch.errors import DataError, UserError
from megabatch.runtime import Runtime

NAN, INF = float("nan"), float("inf")
COLOR = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.2, 0.25, 0.3)}
ROOT = Path(__file__).parents[3]


def arrays(channels: int = 3, count: int = 4) -> ArraySource:
    images = torch.randint(0, 256, (count, channels, 8, 8), dtype=torch.uint8)
    return ArraySource(images, torch.arange(count) % 2, ("cat", "dog"))


def train_loader(**options) -> TrainLoader:
    return TrainLoader(arrays(), **{"seed": 0, **COLOR, **options})


def eval_loader(**options) -> EvalLoader:
    return EvalLoader(arrays(), **{"resolution": 8, **COLOR, **options})


SHARED = [
    ("pixel_mean", (124, 117, 104), r"values in \[0, 1\].*pixel_mean=\(0\.486, 0\.459, 0\.408\)"),
    ("pixel_mean", (0.5, 0.4, 1.01), r"values in \[0, 1\], as pixels are divided by 255"),
    ("pixel_mean", (0.5, -0.1, 0.3), r"values in \[0, 1\].*pixel_mean=\(0\.5, 0\.5, 0\.5\)"),
    ("pixel_mean", (0.5, NAN, 0.3), r"values in \[0, 1\]"),
    ("pixel_mean", (0.5, INF, 0.3), r"values in \[0, 1\]"),
    ("pixel_mean", (0.5, 0.4), "one value for each of the 3 channels"),
    ("pixel_mean", (), "one value for each of the 3 channels"),
    ("pixel_std", (59, 57, 57), r"values in \(0, 1\].*pixel_std=\(0\.231, 0\.224, 0\.224\)"),
    ("pixel_std", (0.2, 0.0, 0.3), r"values in \(0, 1\], as pixels are divided by 255"),
    ("pixel_std", (0.2, -0.25, 0.3), r"values in \(0, 1\]"),
    ("pixel_std", (0.2, NAN, 0.3), r"values in \(0, 1\]"),
    ("pixel_std", (0.2, 0.25, 0.3, 0.3), "one value for each of the 3 channels"),
    ("image_channels", 0, "a whole number, 1 or more"),
    ("image_channels", 3.0, "a whole number, 1 or more"),
    ("dtype", torch.uint8, "a floating-point dtype"),
    ("decode_threads", 0, "None or a whole number, 1 or more"),
    ("decode_threads", 1.5, "None or a whole number, 1 or more"),
    ("prefetch_batches", 0, "a whole number, 1 or more"),
    ("prefetch_batches", -4, "a whole number, 1 or more"),
    ("prefetch_batches", 2.5, "a whole number, 1 or more"),
    ("max_bad_share", -0.1, r"a share of the data set in \[0, 1\]"),
    ("max_bad_share", 5, r"a share of the data set in \[0, 1\]"),
    ("max_bad_share", NAN, r"a share of the data set in \[0, 1\]"),
]
OF_TRAINING = [
    ("seed", 0.5, "a whole number"),
    ("augmentation", "random_resized_crops", "one of none, pad_crop, random_resized_crop"),
    ("crop_padding", -1, "a whole number of pixels, 0 or more"),
    ("crop_padding", 1.5, "a whole number of pixels, 0 or more"),
    ("min_crop_area", 0.0, r"a share of the image's area in \(0, 1\]"),
    ("min_crop_area", NAN, r"a share of the image's area in \(0, 1\]"),
    ("max_crop_area", 8, r"a share of the image's area in \(0, 1\]"),
    ("max_crop_area", 0.05, "min_crop_area=0.08 was given, needed: at most max_crop_area=0.05"),
    ("min_crop_aspect", 0.0, "a finite ratio width / height above 0"),
    ("min_crop_aspect", 2.0, "at most max_crop_aspect=1.333"),
    ("max_crop_aspect", INF, "a finite ratio width / height above 0"),
    ("max_crop_aspect", NAN, "a finite ratio width / height above 0"),
    ("center_crop_ratio", 0.0, r"a share of the shorter side in \(0, 1\]"),
    ("center_crop_ratio", 87.5, r"a share of the shorter side in \(0, 1\]"),
    ("cutout_size", -8, "a whole number of pixels, 0 or more"),
    ("mixup_alpha", -0.2, "a finite number, 0 or more"),
    ("mixup_alpha", NAN, "a finite number, 0 or more"),
    ("cutmix_alpha", -1.0, "a finite number, 0 or more"),
    ("cutmix_alpha", INF, "a finite number, 0 or more"),
    ("color_jitter", -0.1, r"a number in \[0, 1\)"),
    ("color_jitter", 40, r"a number in \[0, 1\)"),
    ("augmentation_ends_epoch", -1.0, "None or a finite number of epochs, 0 or more"),
    ("augmentation_ends_epoch", NAN, "None or a finite number of epochs, 0 or more"),
]
OF_EVALUATION = [
    ("resolution", 0, "a whole number of pixels, 1 or more"),
    ("resolution", 224.5, "a whole number of pixels, 1 or more"),
    ("crop_ratio", 0.0, r"a share of the shorter side in \(0, 1\]"),
    ("crop_ratio", 1.14, r"a share of the shorter side in \(0, 1\]"),
]


@pytest.mark.parametrize(("name", "value", "message"), [*SHARED, *OF_TRAINING])
def test_the_training_loader_refuses_a_value_out_of_range(name, value, message):
    with pytest.raises(UserError, match=message) as refusal:
        train_loader(**{name: value})
    assert "was given, needed: " in str(refusal.value)
    assert "; for example " in str(refusal.value)


@pytest.mark.parametrize(("name", "value", "message"), [*SHARED, *OF_EVALUATION])
def test_the_evaluation_loader_refuses_a_value_out_of_range(name, value, message):
    with pytest.raises(UserError, match=message):
        eval_loader(**{name: value})


@pytest.mark.parametrize(
    "options",
    [
        {"pixel_mean": (0, 1, 0.5), "pixel_std": (1, 1e-3, 1 / 255)},
        {"pixel_mean": np.array(COLOR["pixel_mean"]), "pixel_std": list(COLOR["pixel_std"])},
        {"decode_threads": 1, "prefetch_batches": np.int64(1), "max_bad_share": 0},
        {"max_bad_share": 1, "dtype": torch.float16},
    ],
)
def test_both_loaders_accept_the_ends_of_each_range(options):
    for loader in (train_loader(**options), eval_loader(crop_ratio=1, **options)):
        loader.close()


def test_the_training_loader_accepts_the_ends_of_each_range():
    train_loader(seed=-1, crop_padding=0, min_crop_area=1, max_crop_area=1, augmentation_ends_epoch=0).close()
    train_loader(min_crop_aspect=2, max_crop_aspect=2, center_crop_ratio=1, color_jitter=0.99, mixup_alpha=9).close()


@pytest.mark.parametrize("suggested", ["pixel_mean", "pixel_std"])
def test_the_values_that_the_message_suggests_for_bytes_work(suggested):
    given = {"pixel_mean": (124, 117, 104), "pixel_std": (59, 57, 57)}[suggested]
    with pytest.raises(UserError) as refusal:
        train_loader(**{suggested: given})
    values = str(refusal.value).rsplit("=", 1)[1].strip("()").split(",")
    train_loader(**{suggested: tuple(map(float, values))}).close()


@pytest.mark.parametrize("positions", [range(-2, 2), range(0, 8, 2), range(4, 2), range(4, 0, -1)])
def test_positions_with_gaps_or_below_zero_are_refused(positions):
    with contextlib.closing(train_loader()) as loader:
        with pytest.raises(UserError, match="needed: consecutive numbers, 0 or more; for example"):
            loader.load(positions, resolution=8)
        with pytest.raises(UserError, match="needed: consecutive numbers, 0 or more"):
            list(loader.batches([(positions, 8)]))


@pytest.mark.parametrize("resolution", [0, -8, 8.5])
def test_a_resolution_that_is_no_number_of_pixels_is_refused(resolution):
    with (
        contextlib.closing(train_loader()) as loader,
        pytest.raises(UserError, match="a whole number of pixels, 1 or more"),
    ):
        loader.load(range(2), resolution=resolution)


@pytest.mark.parametrize("indices", [range(-1, 2), range(2, 5), range(0, 4, 2)])
def test_evaluation_indices_outside_the_data_set_are_refused(indices):
    with contextlib.closing(eval_loader()) as loader:
        with pytest.raises(UserError, match="needed: consecutive numbers, 0 or more and below 4"):
            loader.load(indices)
        assert loader.load(range(4)).count == 4


@pytest.mark.parametrize("batch_size", [0, -1, 2.0])
def test_an_evaluation_batch_size_below_one_is_refused(batch_size):
    with (
        contextlib.closing(eval_loader()) as loader,
        pytest.raises(UserError, match=r"batch_size=.*a whole number, 1 or more"),
    ):
        loader.batches(0, 4, batch_size)


def test_files_decode_to_one_or_three_channels_only():
    photos = FolderSource(TEST_PHOTOS / "val")
    with pytest.raises(DataError, match=r"image_channels=2 was given; files decode to 1 \(grey\) or 3 \(RGB\)"):
        TrainLoader(photos, seed=0, image_channels=2, pixel_mean=(0.5, 0.5), pixel_std=(0.5, 0.5))


def test_a_refused_loader_starts_no_thread():
    before = threading.active_count()
    for name, value, _ in SHARED:
        with pytest.raises(UserError):
            train_loader(**{name: value})
    assert threading.active_count() == before


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_the_loaders_accept_the_arguments_of_every_recipe(name):
    recipe = recipes.get(name)
    source, runtime = arrays(recipe.image_channels), Runtime(decode_threads=1)
    train = build_train_loader(recipe, runtime, source, world=World())
    evaluation = build_eval_loader(recipe, runtime, source, world=World())
    images = train.load(range(4), resolution=16).images
    assert images.shape == (4, recipe.image_channels, 16, 16)
    assert images.abs().max() < 5  # means and standard deviations are of pixels in [0, 1]
    assert evaluation.load(range(2)).images.abs().max() < 5
    train.close()
    evaluation.close()


def test_no_caller_in_the_repository_gives_means_in_units_of_bytes():
    pattern = re.compile(r"(?:pixel_mean|pixel_std|_MEAN|_STD)\b[^=\n]*= ?\(([\d., ]+)\)")
    files = [*ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("src/**/*.py")]
    found = list(itertools.chain(*(pattern.findall(path.read_text(encoding="utf-8")) for path in files)))
    assert len(found) > 5
    assert all(float(value) <= 1 for values in found for value in values.split(",") if value.strip())
