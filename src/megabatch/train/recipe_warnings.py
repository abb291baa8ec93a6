"""What a person should know of a recipe before it is trained: it is no mistake, and will not end as hoped."""

import math

from megabatch.recipe import Recipe, value_at

_RECOMPUTED_IMAGES = 16_384  # benchmarks/records/2026-11-20_2cores_large_batch: as many gave back what was lost


def too_few_updates_for_running_averages(recipe: Recipe) -> str | None:
    """A warning if evaluation would use statistics of weights that the run has left behind; None otherwise.

    Running averages remember (1 - stats_momentum)^k of what they were k updates ago, hence some 1 / stats_momentum
    updates. Weights settle in the last tenth of a schedule; with fewer updates there, averages are still those of other
    weights. With growth by noise scale the batch at the start counts: it may get worse.
    """
    from megabatch.train.schedule import total_samples

    if recipe.eval_stats not in {"running", "running_all_reduced"}:
        return None
    batch = value_at(recipe.batch_sizes or ((0.0, recipe.global_batch_size),), recipe.total_epochs)
    last_updates, memory = total_samples(recipe) / batch / 10, 1 / recipe.stats_momentum
    if last_updates >= memory:
        return None
    batches = min(recipe.precise_batches, math.ceil(_RECOMPUTED_IMAGES / recipe.global_batch_size))
    return (
        f"batch norm's running averages follow the weights over 1 / stats_momentum = {memory:.3g} updates, and the "
        f"last tenth of this schedule has {last_updates:.2g}: evaluation may show less than what was learnt; "
        f"--set eval_stats=precise --set precise_batches={batches} works"
    )
