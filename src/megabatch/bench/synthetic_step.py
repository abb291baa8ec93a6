"""The training step of a run on random images, for measurements of its speed."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from megabatch.app.data import Data
from megabatch.app.run import open_run
from megabatch.comm.launch import World
from megabatch.data.loading.batch import Batch
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.sources.arrays import ArraySource
from megabatch.errors import SettingsError
from megabatch.recipe import Recipe
from megabatch.runtime import Runtime
from megabatch.train.state import Loader, Run
from megabatch.train.step import PendingStep, start_step


@dataclasses.dataclass(frozen=True)
class SyntheticStep:
    """A training step that can be repeated; `run_step` computes loss and update as `megabatch train` does.

    `loader` is the run's own, on the data given to `synthetic_step`.
    """

    run: Run
    micro_batch_size: int
    run_step: Callable[[], object]
    loader: Loader


class SameBatches:
    """A loader that creates one random batch per size, in the format of `loader`, and returns it for every request."""

    def __init__(self, recipe: Recipe, device: torch.device, loader: TrainLoader) -> None:
        self._recipe, self._device, self._formatted = recipe, device, loader.formatted
        self._format = torch.channels_last if loader.channels_last else torch.contiguous_format
        self._batches: dict[tuple[int, int], Batch] = {}

    def batches(self, requests: Iterable[tuple[range, int]]) -> Iterator[Batch]:
        """Yields one batch per request `(positions, resolution)`."""
        for positions, resolution in requests:
            size = (len(positions), resolution)
            if size not in self._batches:
                self._batches[size] = self._make(*size)
            yield self._batches[size]

    def _make(self, count: int, resolution: int) -> Batch:
        generator = torch.Generator().manual_seed(count)
        images = torch.randn(count, self._recipe.image_channels, resolution, resolution, generator=generator)
        labels = torch.randint(self._recipe.num_classes, (count,), generator=generator)
        images = self._formatted(images.to(self._device, memory_format=self._format))
        return Batch(images, labels.to(self._device), count)


@contextlib.contextmanager
def synthetic_step(
    recipe: Recipe, runtime: Runtime, *, world: World, global_batch_size: int, data: Data | None = None
) -> Iterator[SyntheticStep]:
    """Yields the step of `megabatch train` with `recipe` and `runtime`, on `global_batch_size` random images.

    `open_run` builds it and makes the same choices as for training; input, evaluation and checkpoints are left out. The
    images have the recipe's largest resolution, and the learning rate is small enough not to diverge.
    """
    pixels = max(value for _, value in recipe.resolution)
    fixed = dataclasses.replace(
        recipe,
        global_batch_size=global_batch_size,
        batch_sizes=(),
        batch_size_rule="fixed",
        max_global_batch_size=0,
        num_train_images=len(data.train) if data else global_batch_size,
        total_epochs=1e6,
        resolution=((0.0, pixels),),
        peak_lr=1e-5,
        lr_scaling="none",
        warmup="none",
        warmup_epochs=0.0,
        decay="constant",
        lr_factors=(),
    )
    with (
        tempfile.TemporaryDirectory(prefix="megabatch-bench-") as folder,
        open_run(
            fixed,
            runtime,
            data or _random_images(recipe, global_batch_size),
            world=world,
            folder=Path(folder),
            stop_requested=lambda: False,
            quiet=True,
        ) as run,
    ):
        assert isinstance(run.loader, TrainLoader)
        loader = run.loader
        run.loader = SameBatches(fixed, world.device, loader)
        largest = max(len(positions) for positions in run.micro_batches(run.settings_at(0, 0)))
        yield SyntheticStep(run, largest, lambda: run_step(run), loader)


def _random_images(recipe: Recipe, count: int) -> Data:
    blank = torch.zeros(1, recipe.image_channels, 8, 8, dtype=torch.uint8)
    classes = tuple(map(str, range(recipe.num_classes)))
    source = ArraySource(blank.expand(count, -1, -1, -1), torch.zeros(count, dtype=torch.int64), classes)
    return Data(source, source, "random images")


def run_step(run: Run) -> PendingStep:
    """Runs one step of `run` on the batches of its loader, and waits for the device."""
    settings = run.settings_at(run.state.step, run.state.samples_seen)
    batches = run.loader.batches((positions, settings.resolution) for positions in run.micro_batches(settings))
    pending = start_step(run, settings, batches)
    pending.loss()  # waits for a GPU
    return pending


def measured_batch_size(recipe: Recipe, wanted: int | None, *, images_at_224: int) -> int:
    """Returns the number of images of a measured step, a multiple of `bn_span`.

    It is `wanted`, or the work of about `images_at_224` images of 224 pixels, at most the recipe's last batch.

    Raises:
        SettingsError: `wanted` is not a multiple of `bn_span`.
    """
    span = recipe.bn_span
    if wanted and wanted % span:
        near = max(1, round(wanted / span)) * span
        raise SettingsError(f"--batch {wanted}: needed a multiple of bn_span={span}; --batch {near} works")
    pixels = max(value for _, value in recipe.resolution)
    default = min(recipe.batch_at(recipe.total_epochs), max(span, int(images_at_224 * (224 / pixels) ** 2)))
    return wanted or max(1, default // span) * span
