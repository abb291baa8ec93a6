"""Prediction of a run: steps, evaluations, time, efficiency, cost."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from megabatch.errors import SettingsError
from megabatch.optim.schedule import resolution_at
from megabatch.plan.convergence import num_updates
from megabatch.plan.exchange import Exchange, grid_of
from megabatch.plan.hardware import Cluster, Hardware
from megabatch.plan.layers import Layer, layers_of
from megabatch.plan.step_time import speed_of
from megabatch.plan.timeline import StepTime, step_time
from megabatch.recipe import Recipe

NUM_EVAL_IMAGES = {"imagenet": 50_000, "fashion_mnist": 10_000, "cifar10": 10_000}


@dataclass(frozen=True)
class Phase:
    """A part of a run with constant batch and resolution."""

    epochs: float
    global_batch_size: int
    resolution: int = 224


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as far as time depends on it."""

    phases: tuple[Phase, ...]
    exchange: Exchange = field(default_factory=Exchange)
    model: str = "resnet50"
    num_images: int = 1_281_167
    num_classes: int = 1000
    in_channels: int = 3
    width: int = 16
    stem: str = "auto"
    bn_span: int = 1  # up to the images of a worker: no collectives
    num_evaluations: float = 0.0
    eval_views: int = 1
    num_eval_images: int = 50_000
    eval_resolution: int = 224
    top1: float | None = None  # expected after these epochs
    epochs_range: tuple[float, float] | None = None  # of published runs at this batch

    @property
    def total_epochs(self) -> float:
        """Epochs of all phases."""
        return sum(phase.epochs for phase in self.phases)


@dataclass(frozen=True)
class Prediction:
    """Time of a run on `num_workers` workers."""

    num_workers: int
    job: Job
    shape: tuple[int, int]
    step: StepTime  # of the longest phase
    local_batch: int  # of the longest phase, images of the busiest worker
    updates: float
    training_s: float
    evaluation_s: float

    @property
    def total_s(self) -> float:
        """Seconds of training and evaluation, after start and compilation."""
        return self.training_s + self.evaluation_s

    @property
    def images_per_s(self) -> float:
        """Training throughput of all workers, without evaluations."""
        return self.job.total_epochs * self.job.num_images / self.training_s

    def cost(self, price_per_device_hour: float) -> float:
        """Cost of the run in the unit of the price."""
        return self.num_workers * self.total_s / 3600 * price_per_device_hour


def predict(job: Job, num_workers: int, cluster: Cluster, hardware: Hardware) -> Prediction:
    """Returns the prediction of `job` on `num_workers` devices of `cluster`."""
    training_s, updates = 0.0, 0.0
    parts: list[tuple[float, StepTime, int]] = []
    for phase in job.phases:
        if num_workers > phase.global_batch_size:
            raise SettingsError(
                f"{num_workers:,} workers for a global batch of {phase.global_batch_size:,} images: some have none; "
                f"{phase.global_batch_size:,} workers work"
            )
        local = math.ceil(phase.global_batch_size / num_workers)
        step = step_time(
            _layers(job, phase.resolution),
            local_batch=local,
            bn_span=job.bn_span,
            num_workers=num_workers,
            exchange=job.exchange,
            cluster=cluster,
            hardware=hardware,
        )
        count = num_updates(phase.epochs, job.num_images, phase.global_batch_size)
        parts.append((count * step.total_s, step, local))
        training_s, updates = training_s + count * step.total_s, updates + count
    _, step, local = max(parts, key=lambda part: part[0])
    shape = grid_of(job.exchange, num_workers, cluster)
    evaluation_s = job.num_evaluations * _evaluation_s(job, num_workers, cluster, hardware)
    return Prediction(num_workers, job, shape, step, local, updates, training_s, evaluation_s)


def job_of(recipe: Recipe, exchange: Exchange | None = None) -> Job:
    """Returns the job of a recipe: its phases, evaluations and published accuracy."""
    return Job(
        phases=tuple(_phases(recipe)),
        exchange=exchange or Exchange(),
        model=recipe.model,
        num_images=recipe.num_train_images,
        num_classes=recipe.num_classes,
        in_channels=recipe.image_channels,
        width=recipe.width,
        stem=recipe.stem,
        bn_span=recipe.bn_span,
        num_evaluations=recipe.num_evaluations,
        eval_views=1 + recipe.eval_flip,
        num_eval_images=NUM_EVAL_IMAGES.get(recipe.dataset, recipe.num_train_images // 10),
        eval_resolution=recipe.eval_resolution,
        top1=recipe.published_top1,
    )


def _phases(recipe: Recipe) -> Iterator[Phase]:
    """Cuts the run where batch or resolution change, at whole epochs where the resolution ramps."""
    borders = {epoch for schedule in (recipe.batch_sizes, recipe.resolution) for epoch, _ in schedule}
    if recipe.resolution_ramp:
        borders |= set(range(math.ceil(recipe.total_epochs)))
    edges = sorted({0.0, *(float(it) for it in borders if it < recipe.total_epochs), recipe.total_epochs})
    for first, last in itertools.pairwise(edges):
        yield Phase(
            last - first, recipe.batch_at(first), resolution_at(first, recipe.resolution, recipe.resolution_ramp)
        )


def _layers(job: Job, resolution: int) -> tuple[Layer, ...]:
    return layers_of(
        job.model,
        resolution=resolution,
        num_classes=job.num_classes,
        in_channels=job.in_channels,
        width=job.width,
        stem=job.stem,
    )


def _evaluation_s(job: Job, num_workers: int, cluster: Cluster, hardware: Hardware) -> float:
    """Seconds of one evaluation: forward passes of each worker's share of the images."""
    speed = speed_of(cluster.stack, hardware)
    batch = math.ceil(job.num_eval_images / num_workers)
    return job.eval_views * sum(speed.forward_s(layer, batch) for layer in _layers(job, job.eval_resolution))
