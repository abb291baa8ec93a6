"""Warnings for valid recipes that are likely to underperform."""

import math

from megabatch.recipe import Recipe
from megabatch.train.schedule import count_steps, total_samples

_RECOMPUTED_IMAGES = 16_384  # enough to recover the loss: benchmarks/records/2026-11-20_2cores_large_batch


def warnings_for(recipe: Recipe) -> list[str]:
    """Returns all warnings of this module that apply to a recipe fitted to its data."""
    found = (batch_larger_than_data(recipe), too_few_updates_for_running_averages(recipe))
    return [text for text in found if text]


def batch_larger_than_data(recipe: Recipe) -> str | None:
    """Returns a warning if a global batch repeats images, so that a run has less than one update per epoch, else None.

    It happens where a recipe of a large data set trains a small one: its schedule is in epochs, and keeps its length.
    """
    num_images, batch = recipe.num_train_images, recipe.smallest_batch
    if batch <= num_images:
        return None
    fitting = max(1, num_images // 10)
    span = min(recipe.bn_span, fitting)
    smaller = f"--set global_batch_size={fitting // span * span}"
    if span < recipe.bn_span:
        smaller += f" --set bn_span={span}"
    if recipe.batch_sizes:
        smaller += " --set batch_sizes=none"
    elsewhere = "" if recipe.name == "photos" else "recipe photos is meant for small data sets, or "
    return (
        f"a global batch of {batch:,} images is larger than the data set of {num_images:,}: {count_steps(recipe):,} "
        f"updates in {recipe.total_epochs:g} epochs; {elsewhere}{smaller} works, with a peak_lr for that batch"
    )


def too_few_updates_for_running_averages(recipe: Recipe) -> str | None:
    """Returns a warning if batch norm's running averages would lag behind the weights at the end, else None.

    Running averages keep (1 - stats_momentum)^k of their value of k updates ago, so they cover about
    1 / stats_momentum updates. Weights settle in the last tenth of a schedule; if that has fewer updates, the averages
    still describe earlier weights. Under growth by noise scale the initial batch counts, which is the best case.
    """
    if recipe.eval_stats not in {"running", "running_all_reduced"}:
        return None
    batch = recipe.batch_at(recipe.total_epochs)
    last_updates, memory = total_samples(recipe) / batch / 10, 1 / recipe.stats_momentum
    if last_updates >= memory:
        return None
    batches = min(recipe.precise_batches, math.ceil(_RECOMPUTED_IMAGES / batch))
    return (
        f"batch norm's running averages cover 1 / stats_momentum = {memory:.3g} updates, but the last tenth of this "
        f"schedule has {last_updates:.2g}: evaluation may show less accuracy than the weights have; "
        f"--set eval_stats=precise --set precise_batches={batches} works"
    )
