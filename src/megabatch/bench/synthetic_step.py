"""A run's own training step on made-up images: what is measured where only the step's speed matters."""

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
from megabatch.data.sources.arrays import ArraySource
from megabatch.recipe import Recipe, value_at
from megabatch.runtime import Runtime
from megabatch.train.state import Run
from megabatch.train.step import PendingStep, start_step


@dataclasses.dataclass(frozen=True)
class SyntheticStep:
    """One run's step, ready to be taken again and again; loss and weights are those of a real one."""

    run: Run
    micro_batch_size: int
    take: Callable[[], None]


class SameBatches:
    """A loader that has one batch ready for each size that is asked for."""

    def __init__(self, recipe: Recipe, device: torch.device, *, channels_last: bool) -> None:
        self._recipe, self._device = recipe, device
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._made: dict[tuple[int, int], Batch] = {}

    def batches(self, requests: Iterable[tuple[range, int]]) -> Iterator[Batch]:
        """One batch per request `(positions, resolution)`."""
        for positions, resolution in requests:
            size = (len(positions), resolution)
            if size not in self._made:
                self._made[size] = self._make(*size)
            yield self._made[size]

    def _make(self, count: int, resolution: int) -> Batch:
        generator = torch.Generator().manual_seed(count)
        images = torch.randn(count, self._recipe.image_channels, resolution, resolution, generator=generator)
        labels = torch.randint(self._recipe.num_classes, (count,), generator=generator)
        images = images.to(self._device, memory_format=self._format)
        return Batch(images, labels.to(self._device), count)


@contextlib.contextmanager
def synthetic_step(
    recipe: Recipe, runtime: Runtime, *, world: World, global_batch_size: int
) -> Iterator[SyntheticStep]:
    """The step that `megabatch train` takes with `recipe` at `runtime`, on `global_batch_size` random images.

    Wired by `open_run`, with all of its own choices; input, evaluation and checkpoints are left out. The images
    have the recipe's largest resolution, and the rate is so small that nothing diverges.
    """
    pixels = max(value for _, value in recipe.resolution)
    fixed = dataclasses.replace(
        recipe,
        global_batch_size=global_batch_size,
        batch_sizes=(),
        batch_size_rule="fixed",
        max_global_batch_size=0,
        num_train_images=global_batch_size,
        total_epochs=1e6,
        resolution=((0.0, pixels),),
        peak_lr=1e-5,
        lr_scaling="none",
        warmup="none",
        warmup_epochs=0.0,
        decay="constant",
        lr_factors=(),
    )
    blank = torch.zeros(1, recipe.image_channels, 8, 8, dtype=torch.uint8)
    source = ArraySource(
        blank.expand(global_batch_size, -1, -1, -1),
        torch.zeros(global_batch_size, dtype=torch.int64),
        tuple(map(str, range(recipe.num_classes))),
    )
    with (
        tempfile.TemporaryDirectory(prefix="megabatch-bench-") as folder,
        open_run(
            fixed,
            runtime,
            Data(source, source, "random images"),
            world=world,
            folder=Path(folder),
            stop_requested=lambda: False,
            quiet=True,
        ) as run,
    ):
        run.loader = SameBatches(fixed, world.device, channels_last=runtime.channels_last)
        largest = max(len(positions) for positions in run.micro_batches(run.settings_at(0, 0)))
        yield SyntheticStep(run, largest, lambda: _take(run))


def _take(run: Run) -> None:
    settings = run.settings_at(run.state.step, run.state.samples_seen)
    batches = run.loader.batches((positions, settings.resolution) for positions in run.micro_batches(settings))
    taken: PendingStep = start_step(run, settings, batches)
    if run.world.device.type == "cuda":
        taken.loss()


def usual_batch(recipe: Recipe, wanted: int | None, *, images_at_224: int) -> int:
    """How many images a measured step takes: `wanted` in whole spans, or about as many as a moment's work is."""
    pixels = max(value for _, value in recipe.resolution)
    largest = int(value_at(recipe.batch_sizes, recipe.total_epochs)) if recipe.batch_sizes else recipe.global_batch_size
    usual = min(largest, max(recipe.bn_span, int(images_at_224 * (224 / pixels) ** 2)))
    return max(1, (wanted or usual) // recipe.bn_span) * recipe.bn_span
