"""The schedule of a run: rates, batch and resolution of a step as pure functions of the samples seen before it.

The way of a learning rate: `Recipe.peak_lr` -> `settings_at` -> `StepSettings.lr` -> `apply_settings` -> the optimizer.
"""

import math
from dataclasses import dataclass
from typing import Any

from megabatch.optim import schedule
from megabatch.optim.batch_size import adjusted
from megabatch.optim.schedule import sgd_share
from megabatch.recipe import Recipe


@dataclass(frozen=True)
class StepSettings:
    """Everything that one optimizer step depends on: a pure function of the samples seen before it."""

    step: int
    first: int  # stream position of the step's first sample
    count: int  # samples of the global batch
    epoch: float  # fractional, at the start of the step
    resolution: int  # pixels
    lr: float
    momentum: float
    weight_decay_factor: float = 1.0
    sgd_share: float | None = None  # RMSprop warm-up only

    @property
    def next_sample(self) -> int:
        """Stream position after this step."""
        return self.first + self.count


def peak_lr(recipe: Recipe) -> float:
    """Peak learning rate, scaled to the recipe's (first) global batch."""
    return schedule.scaled_peak_lr(
        recipe.peak_lr,
        scaling=recipe.lr_scaling,
        global_batch_size=recipe.batch_at(0.0),
        reference_batch_size=recipe.lr_reference_batch_size,
    )


def settings_at(recipe: Recipe, step: int, first: int, *, global_batch_size: int | None = None) -> StepSettings:
    """Settings of `step`, which starts at stream position `first`.

    `global_batch_size` replaces the recipe's where the batch grows with the noise scale.
    """
    epoch = first / recipe.num_train_images
    batch = global_batch_size or recipe.batch_at(epoch)
    peak = peak_lr(recipe)
    lr = schedule.learning_rate(
        epoch,
        peak_lr=peak,
        total_epochs=recipe.total_epochs,
        warmup=recipe.warmup,
        warmup_epochs=recipe.warmup_epochs,
        warmup_start_lr=recipe.warmup_start_lr,
        decay=recipe.decay,
        poly_power=recipe.poly_power,
        end_lr=recipe.end_lr,
        decay_epochs=recipe.decay_epochs,
        decay_counts_warmup=recipe.decay_counts_warmup,
        lr_factors=recipe.lr_factors,
    )
    factor = lr / peak if recipe.weight_decay_follows_lr and peak else 1.0
    lr, momentum = adjusted(
        lr,
        recipe.momentum,
        batch=batch,
        base_batch=recipe.batch_at(0.0),
        rule=recipe.batch_size_rule,
        num_train_images=recipe.num_train_images,
    )
    share = None
    if recipe.optimizer == "rmsprop_warmup":
        share = sgd_share(epoch, center_epoch=recipe.rmsprop_center_epoch, period_epochs=recipe.rmsprop_period_epochs)
    return StepSettings(
        step=step,
        first=first,
        count=min(batch, total_samples(recipe) - first),
        epoch=epoch,
        resolution=schedule.resolution_at(epoch, recipe.resolution, ramp=recipe.resolution_ramp),
        lr=lr,
        momentum=momentum,
        weight_decay_factor=factor,
        sgd_share=share,
    )


def total_samples(recipe: Recipe) -> int:
    """Samples of the whole run; the last step takes the remainder, so it may be smaller than a global batch."""
    return math.ceil(recipe.total_epochs * recipe.num_train_images - 1e-6)


def count_steps(recipe: Recipe) -> int:
    """Optimizer steps of the whole run."""
    total, images = total_samples(recipe), recipe.num_train_images
    if not recipe.batch_sizes:
        return -(-total // recipe.global_batch_size)
    ends = [epoch for epoch, _ in recipe.batch_sizes[1:]] + [math.inf]
    steps = first = 0
    for (_, size), end in zip(recipe.batch_sizes, ends, strict=True):
        # One step less than the estimate, and the rest one by one: the products round.
        until = min(total, end * images)
        whole = max(0, int((until - first) // size) - 1)
        steps, first = steps + whole, first + whole * int(size)
        while first < total and first / images < end:
            steps, first = steps + 1, first + int(size)
    return steps


def end_of_steps(recipe: Recipe, first: int, num_steps: int) -> int:
    """Stream position after `num_steps` steps from position `first`, at most the end of the run."""
    for _ in range(num_steps):
        if first >= total_samples(recipe):
            break
        first += recipe.batch_at(first / recipe.num_train_images)
    return min(first, total_samples(recipe))


def apply_settings(groups: list[dict[str, Any]], settings: StepSettings) -> None:
    """Writes a step's rates into every parameter group (`optimizer.param_groups`).

    A rate that is a tensor is filled in place, so that a captured CUDA graph reads the new value.
    """
    for group in groups:
        if "base_weight_decay" not in group:
            group["base_weight_decay"] = float(group["weight_decay"])
        _set(group, "lr", settings.lr * group.get("lr_factor", 1.0))
        _set(group, "weight_decay", group["base_weight_decay"] * settings.weight_decay_factor)
        if "momentum" in group:
            _set(group, "momentum", settings.momentum)
        if "sgd_share" in group and settings.sgd_share is not None:
            _set(group, "sgd_share", settings.sgd_share)


def _set(group: dict[str, Any], name: str, value: float) -> None:
    if isinstance(group[name], int | float):
        group[name] = value
    else:
        group[name].fill_(value)
