"""The data of a run: sources from a known data set or a folder, and the loaders over them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megabatch.comm.launch import World, available_cores
from megabatch.data import fetch
from megabatch.data.arrays import ArraySource
from megabatch.data.loader import EvalLoader, TrainLoader
from megabatch.data.source import EncodedSource
from megabatch.errors import DataError
from megabatch.recipe import Recipe, validate
from megabatch.site import Site

Source = ArraySource | EncodedSource

PROBED_FILES = 20_000


@dataclass(frozen=True)
class Data:
    """The two sets of a run, and where they came from in words."""

    train: Source
    evaluation: Source
    origin: str


def open_data(
    recipe: Recipe,
    site: Site,
    *,
    on_progress: Callable[[str], None] | None = None,
    probe: bool = False,
) -> Data:
    """The recipe's data set, or the folder the site names instead; DataError or FetchError if it cannot be had.

    `probe` looks for damaged files too (at most `PROBED_FILES` a set).
    """
    if site.data is None and recipe.dataset == "folder":
        raise DataError(f"recipe {recipe.name} has no data set of its own; --data PATH names yours, a class per folder")
    if site.data is None:
        fetched = fetch.fetch(recipe.dataset, cache=site.cache, on_progress=on_progress)
        return Data(*fetch.load(recipe.dataset, cache=site.cache), fetched.source)
    if not site.data.is_dir():
        raise DataError(
            f"no folder {site.data}; --data needs a folder with train/ and val/, a class per folder in each"
        )
    train, evaluation = _open_path(site.data, probe=probe)
    return Data(train, evaluation, f"folder {site.data.name}")


def _open_path(path: Path, *, probe: bool) -> tuple[EncodedSource, EncodedSource]:
    from megabatch.data import folder, parquet, shards

    if any(path.rglob("*.tar")) or any(path.rglob("*.tar.gz")):
        return shards.open_shards(path)
    if any(path.rglob("*.parquet")):
        return parquet.open_parquet(path)
    train, evaluation = folder.open_folder(path)
    for source in (train, evaluation) if probe else ():
        source.probe(sample=PROBED_FILES)
    return train, evaluation


def fit_to_data(recipe: Recipe, data: Data) -> Recipe:
    """The recipe with the counts of the data that is really there."""
    return validate(
        dataclasses.replace(recipe, num_train_images=len(data.train), num_classes=len(data.train.class_names))
    )


def build_train_loader(
    recipe: Recipe, site: Site, source: Source, *, world: World, on_bad_sample: Callable[[str, str], None] | None = None
) -> TrainLoader:
    """Batches of the training set, augmented as the recipe says."""
    return TrainLoader(
        source,
        seed=recipe.seed,
        augmentation=recipe.augmentation,
        crop_padding=recipe.crop_padding,
        min_crop_area=recipe.min_crop_area,
        max_crop_area=recipe.max_crop_area,
        min_crop_aspect=recipe.min_crop_aspect,
        max_crop_aspect=recipe.max_crop_aspect,
        center_crop_ratio=recipe.eval_crop_ratio,
        flip=recipe.flip,
        cutout_size=recipe.cutout_size,
        mixup_alpha=recipe.mixup_alpha,
        cutmix_alpha=recipe.cutmix_alpha,
        color_jitter=recipe.color_jitter,
        augmentation_ends_epoch=recipe.augmentation_ends_epoch,
        pixel_mean=recipe.pixel_mean,
        pixel_std=recipe.pixel_std,
        image_channels=recipe.image_channels,
        device=world.device,
        channels_last=site.channels_last,
        decode_threads=site.decode_threads or max(1, available_cores() // world.local_world_size),
        prefetch_batches=site.prefetch_batches,
        on_bad_sample=on_bad_sample,
    )


def build_eval_loader(recipe: Recipe, site: Site, source: Source, *, world: World) -> EvalLoader:
    """The evaluation set, resized and centre-cropped as the recipe says."""
    return EvalLoader(
        source,
        resolution=recipe.eval_resolution,
        crop_ratio=recipe.eval_crop_ratio,
        pixel_mean=recipe.pixel_mean,
        pixel_std=recipe.pixel_std,
        image_channels=recipe.image_channels,
        device=world.device,
        channels_last=site.channels_last,
        decode_threads=site.decode_threads or max(1, available_cores() // world.local_world_size),
    )


def eval_block_size(recipe: Recipe) -> int:
    """Samples of one evaluation forward: a function of the recipe alone, so that every sample has the same neighbours
    on any number of workers."""
    return max(8, min(512, int(512 * (32 / recipe.eval_resolution) ** 2)))
