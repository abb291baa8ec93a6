"""Data of a run: opens its sources (a known data set, a folder, or remote shards) and builds the loaders."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from megabatch.comm.launch import World
from megabatch.cores import usable_cores
from megabatch.data.fetching import fetch
from megabatch.data.jpeg.gpu import GpuDecoder, has_torchvision
from megabatch.data.loading.eval_loader import EvalLoader
from megabatch.data.loading.held_out import hold_out
from megabatch.data.loading.order import shards_at_once
from megabatch.data.loading.train_loader import TrainLoader, shard_sizes
from megabatch.data.sources.arrays import ArraySource
from megabatch.data.sources.dataset import EVALUATION_PARTS, open_train_and_evaluation, part_names
from megabatch.data.sources.folder import FolderSource
from megabatch.data.sources.labels import agree_on_classes
from megabatch.data.sources.protocol import EncodedSource
from megabatch.data.sources.python_dataset import open_python
from megabatch.data.sources.remote import RemoteShards, open_remote_shards
from megabatch.errors import DataError, SettingsError
from megabatch.files import cache_folder
from megabatch.recipe import Recipe
from megabatch.recipe_validation import validate
from megabatch.runtime import Runtime
from megabatch.user_code import is_function, short_name

Source = ArraySource | EncodedSource

PROBED_FILES = 20_000
_DEFAULT_BAD_SHARE = 0.01
_FEW_THREADS = 4  # each decodes 1,100 images of 400 x 533 a second, and 3,300 with the compiled decoder
_GIB = 1 << 30


@dataclass(frozen=True)
class Data:
    """Training and evaluation set of a run; `origin` is where they came from, `notes` what a user may not expect."""

    train: Source
    evaluation: Source
    origin: str
    notes: Sequence[str] = ()

    def close(self) -> None:
        """Stops background work of the sources, such as prefetching; call it after the loaders are closed."""
        for source in (self.train, self.evaluation):
            if isinstance(source, RemoteShards):
                source.close()


def open_data(
    recipe: Recipe,
    runtime: Runtime,
    *,
    on_progress: Callable[[str], None] | None = None,
    probe: bool = False,
) -> Data:
    """Opens the recipe's data set, or the folder or remote shards of `runtime.data`.

    `probe` also searches folders for corrupt files (at most `PROBED_FILES` per set), unless the runtime sets
    `max_bad_share`.

    Raises:
        DataError, FetchError: the data set is unavailable.
        SettingsError: GPU decoding is unavailable.
    """
    _check_decode(runtime)
    if runtime.data is None and recipe.dataset == "folder":
        raise DataError(f"recipe {recipe.name} has no data set of its own; --data PATH names yours, a class per folder")
    data = _open(recipe, runtime, on_progress=on_progress, probe=probe and runtime.max_bad_share is None)
    if recipe.shard_local:
        shard_sizes(data.train)
    return data


def open_evaluation_data(recipe: Recipe, runtime: Runtime, *, held_out: float | None = None) -> Data:
    """As `open_data`, but a data set may have only val or test; `train` is then the evaluation set too.

    Where neither is there, the fraction `held_out` of train is the evaluation set: the one that the run held out. Notes
    say if more images are left than the run trained on, as it may have trained on evaluated ones.

    Raises:
        DataError, FetchError, SettingsError: as `open_data`.
    """
    path = runtime.data
    if path is None or "://" in str(path):
        return open_data(recipe, runtime)
    _check_decode(runtime)
    if held_out and runtime.val_fraction is None and _has_only_train(path, runtime):
        runtime = dataclasses.replace(runtime, val_fraction=held_out)
    if runtime.val_fraction is not None or is_function(path):
        return _with_leak_note(recipe, runtime, _open(recipe, runtime, on_progress=None, probe=False))
    dataset = open_train_and_evaluation(path, train_needed=False, **_parts(runtime))
    *_, evaluation = dataset.parts.values()
    train = dataset.parts.get(runtime.train_split, evaluation)
    return Data(train, evaluation, _origin(Path(path)), dataset.notes)


def _has_only_train(path: Path | str, runtime: Runtime) -> bool:
    """True for a folder or file without val and test, where no part to evaluate on was named."""
    if runtime.val_split != "auto" or is_function(path):
        return False
    return not set(part_names(path)) & set(EVALUATION_PARTS)


def _with_leak_note(recipe: Recipe, runtime: Runtime, data: Data) -> Data:
    """`data` with a note if the run trained on fewer images than are left beside the held-out ones."""
    if runtime.val_fraction is None or len(data.train) == recipe.num_train_images:
        return data
    note = (
        f"the run trained on {recipe.num_train_images:,} images, and {len(data.train):,} are left with --val-fraction "
        f"{runtime.val_fraction:g}: it may have trained on some that are evaluated; its own fraction works"
    )
    return dataclasses.replace(data, notes=[*data.notes, note])


def _parts(runtime: Runtime) -> dict[str, Any]:
    """The parts to open, as arguments of `open_train_and_evaluation`."""
    evaluation = None if runtime.val_split == "auto" else runtime.val_split
    return {"train": runtime.train_split, "evaluation": evaluation, "only_train": runtime.val_fraction is not None}


def _open(recipe: Recipe, runtime: Runtime, *, on_progress: Callable[[str], None] | None, probe: bool) -> Data:
    _check_parts(runtime)
    if runtime.data is None:
        fetched = fetch.fetch(recipe.dataset, cache=runtime.cache, on_progress=on_progress)
        train, evaluation = fetch.load(recipe.dataset, cache=runtime.cache)
        return _with_evaluation(runtime, train, evaluation, fetched.source, [])
    if is_function(runtime.data):
        return _open_function(str(runtime.data), runtime)
    if "://" in str(runtime.data):
        return _open_url(str(runtime.data), runtime)
    path = Path(runtime.data)
    dataset = open_train_and_evaluation(path, **_parts(runtime))
    for source in dataset.parts.values() if probe else ():
        if isinstance(source, FolderSource):
            source.probe(sample=PROBED_FILES)
    first, *rest = dataset.parts.values()
    return _with_evaluation(runtime, first, (rest or [first])[0], _origin(path), dataset.notes)


def _with_evaluation(
    runtime: Runtime, train: Source, evaluation: Source | None, origin: str, notes: Sequence[str]
) -> Data:
    """The data with its evaluation set, or with a held-out fraction of the training set in its place."""
    if runtime.val_fraction is None:
        if evaluation is None:
            raise DataError(f"{origin} has no validation set; --val-fraction 0.1 holds out a tenth of train")
        return Data(train, evaluation, origin, notes)
    train, evaluation = hold_out(train, runtime.val_fraction)
    if not len(evaluation):
        raise DataError(f"{origin}: no class has two images, so that none can be held out; more images work")
    note = f"{len(evaluation):,} of {len(train) + len(evaluation):,} training images are held out for evaluation"
    return Data(train, evaluation, origin, [*notes, note])


def _open_function(text: str, runtime: Runtime) -> Data:
    parts = open_python(text)
    notes = agree_on_classes(parts, text, numbered=all(source.numbered for source in parts.values()))
    return _with_evaluation(runtime, parts["train"], parts.get("val"), f"function {short_name(text)}", notes)


def _check_parts(runtime: Runtime) -> None:
    """Raises SettingsError for options of parts that the data set cannot follow."""
    is_url, given = "://" in str(runtime.data), (runtime.train_split, runtime.val_split) != ("train", "auto")
    if is_url and (given or runtime.val_fraction is not None):
        raise SettingsError("--train-split, --val-split and --val-fraction need local data; a copy of the shards works")
    if given and (runtime.data is None or is_function(runtime.data)):
        raise SettingsError("--train-split and --val-split name parts of a folder or file; --data PATH works")
    if runtime.val_fraction is not None and runtime.val_split != "auto":
        raise SettingsError("--val-split and --val-fraction exclude each other; --val-fraction alone works")
    if runtime.train_split == runtime.val_split:
        raise SettingsError(f"--train-split and --val-split are both {runtime.val_split}; --val-fraction 0.1 works")


def _origin(path: Path) -> str:
    return f"{'file' if path.is_file() else 'folder'} {path.name}"


def _open_url(url: str, runtime: Runtime) -> Data:
    cache = (runtime.cache or cache_folder()) / "remote"
    train, evaluation, notes = open_remote_shards(url, cache=cache, max_bytes=_room(runtime))
    parts = urlsplit(url)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # without credentials
    return Data(train, evaluation, shown, notes)


def check_room(recipe: Recipe, runtime: Runtime, data: Data, *, world: World) -> None:
    """Raises SettingsError if the shard cache is smaller than the shards that one machine's workers read at once.

    In shard-local order that is the current window and the next; otherwise any shard may be next.
    """
    if not isinstance(data.train, RemoteShards):
        return
    here = recipe.largest_batch * world.local_world_size // world.world_size
    num_shards = shards_at_once(here, num_workers=world.local_world_size, shard_sizes=data.train.shard_sizes)
    needed_locally = data.train.bytes_at_once(num_shards)
    needed = needed_locally if recipe.shard_local else data.train.bytes_at_once(None)
    if needed > _room(runtime):
        raise SettingsError(_too_little_room(recipe, runtime, needed, needed_locally, num_shards))


def _room(runtime: Runtime) -> int:
    return int(runtime.remote_cache_gib * _GIB)


def _too_little_room(recipe: Recipe, runtime: Runtime, needed: int, needed_locally: int, num_shards: int) -> str:
    given = runtime.remote_cache_gib
    where = f"windows of shards, {num_shards} shards at a time" if recipe.shard_local else "all shards"
    text = (
        f"--remote-cache-gib {given:g} is too little for samples in random order from {where}, {_up(needed)} GiB; "
        f"--remote-cache-gib {_up(needed)} works"
    )
    if recipe.shard_local or needed_locally == needed:
        return text
    return f"{text}, or --set shard_local=true with --remote-cache-gib {max(_up(needed_locally), given):g}"


def _up(num_bytes: int) -> float:
    """GiB, rounded up to three decimals."""
    return math.ceil(1000 * num_bytes / _GIB) / 1000


def fit_to_data(recipe: Recipe, data: Data) -> Recipe:
    """The recipe with the sample and class counts of `data`."""
    return validate(
        dataclasses.replace(recipe, num_train_images=len(data.train), num_classes=len(data.train.class_names))
    )


def build_train_loader(
    recipe: Recipe,
    runtime: Runtime,
    source: Source,
    *,
    world: World,
    on_bad_sample: Callable[[str, str], None] | None = None,
    dtype: torch.dtype = torch.float32,
    padded_channels: int | None = None,
) -> TrainLoader:
    """Loader of the training set, with the recipe's augmentation; `dtype`, `padded_channels` as in `TrainLoader`."""
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
        alternate_flip=recipe.alternate_flip,
        cutout_size=recipe.cutout_size,
        mixup_alpha=recipe.mixup_alpha,
        cutmix_alpha=recipe.cutmix_alpha,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.auto_augment,
        rand_num_ops=recipe.rand_num_ops,
        rand_magnitude=recipe.rand_magnitude,
        random_erasing=recipe.random_erasing,
        augmentation_ends_epoch=recipe.augmentation_ends_epoch,
        balanced=recipe.sampling == "balanced",
        shard_local=recipe.shard_local,
        pixel_mean=recipe.pixel_mean,
        pixel_std=recipe.pixel_std,
        image_channels=recipe.image_channels,
        device=world.device,
        channels_last=runtime.channels_last is not False,
        dtype=dtype,
        padded_channels=padded_channels,
        decode_threads=_decode_threads(runtime, world),
        prefetch_batches=runtime.prefetch_batches,
        max_bad_share=_max_bad_share(runtime),
        on_bad_sample=on_bad_sample,
        gpu_decoder=_gpu_decoder(recipe, runtime, source, world=world, cache_gib=runtime.decoded_cache_gib),
    )


def build_eval_loader(recipe: Recipe, runtime: Runtime, source: Source, *, world: World) -> EvalLoader:
    """Loader of the evaluation set, resized and centre-cropped as the recipe specifies."""
    return EvalLoader(
        source,
        resolution=recipe.eval_resolution,
        crop_ratio=recipe.eval_crop_ratio,
        pixel_mean=recipe.pixel_mean,
        pixel_std=recipe.pixel_std,
        image_channels=recipe.image_channels,
        device=world.device,
        channels_last=runtime.channels_last is not False,
        decode_threads=_decode_threads(runtime, world),
        max_bad_share=_max_bad_share(runtime),
        gpu_decoder=_gpu_decoder(recipe, runtime, source, world=world, cache_gib=0.0),
    )


def _decode_threads(runtime: Runtime, world: World) -> int:
    return runtime.decode_threads or max(1, usable_cores() // world.local_world_size)


def _check_decode(runtime: Runtime) -> None:
    """Raises SettingsError if the decoder that the runtime requests is unavailable on this machine."""
    if runtime.decode == "cpu" and runtime.decoded_cache_gib:
        raise SettingsError(
            f"--decoded-cache-gib {runtime.decoded_cache_gib:g} keeps what a GPU has decoded, and --decode cpu was "
            "given: a CPU decodes a crop sooner than it cuts it out of a decoded image; --decoded-cache-gib 0 works"
        )
    if runtime.decode == "gpu" or runtime.decoded_cache_gib:
        asked = "--decode gpu" if runtime.decode == "gpu" else f"--decoded-cache-gib {runtime.decoded_cache_gib:g}"
        works = "--decode cpu --decoded-cache-gib 0 works"
        if runtime.device == "cpu" or not torch.cuda.is_available():
            raise SettingsError(f"{asked} was given, needed: a GPU to train on; {works}")
        if not has_torchvision():
            raise SettingsError(f"{asked} was given, needed: a torchvision built for this torch; {works}")


def _gpu_decoder(
    recipe: Recipe, runtime: Runtime, source: Source, *, world: World, cache_gib: float
) -> GpuDecoder | None:
    """GPU decoder of this source, or None if CPU threads decode.

    With `decode=auto` the GPU decodes only if few threads are available: its time is better spent on training.
    """
    wanted = runtime.decode == "gpu" or runtime.decoded_cache_gib > 0
    if runtime.decode == "auto" and _decode_threads(runtime, world) < _FEW_THREADS:
        wanted = wanted or (world.device.type == "cuda" and has_torchvision())
    if not wanted or isinstance(source, ArraySource):
        return None
    return GpuDecoder(world.device, channels=recipe.image_channels, cache_bytes=int(cache_gib * _GIB))


def _max_bad_share(runtime: Runtime) -> float:
    return _DEFAULT_BAD_SHARE if runtime.max_bad_share is None else runtime.max_bad_share
