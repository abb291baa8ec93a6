"""Dry runs: a few steps of a recipe, on made photographs if it has no data at hand, and the time of a whole run."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from megabatch.app.data import Data, open_data
from megabatch.data.fetching.catalog import KNOWN
from megabatch.data.sources.made import MadePhotos
from megabatch.errors import SettingsError
from megabatch.observe.events import read_events
from megabatch.observe.progress import duration
from megabatch.observe.run_folder import EVENTS_FILE
from megabatch.optim.schedule import resolution_at
from megabatch.recipe import Recipe
from megabatch.runtime import Runtime

WARM_UP_STEPS = 2
"""First steps, which are left out: they compile, allocate and wait for the first images."""
NUM_EVAL_IMAGES = 50_000
"""Evaluation images of ImageNet."""
_EVALUATED_IMAGES = 512
"""Made images that a dry run evaluates; the time for `NUM_EVAL_IMAGES` is in proportion."""


def open_dry_data(recipe: Recipe, runtime: Runtime, **options: Any) -> Data:
    """As `open_data`; made photographs where the recipe has no data set of its own and the runtime names none."""
    if runtime.data is not None or recipe.dataset in KNOWN:
        return open_data(recipe, runtime, **options)
    train = MadePhotos(recipe.num_train_images, recipe.num_classes)
    return Data(train, MadePhotos(_EVALUATED_IMAGES, recipe.num_classes), train.describe())


def check_dry_run(num_steps: int, runtime: Runtime) -> None:
    """Raises SettingsError for a number of steps that leaves none to measure, and for a run that resumes."""
    if num_steps <= WARM_UP_STEPS:
        raise SettingsError(
            f"--dry-run {num_steps}: needed more than {WARM_UP_STEPS} steps, as the first {WARM_UP_STEPS} are not "
            f"measured; --dry-run {WARM_UP_STEPS + 8} works"
        )
    if runtime.resume:
        raise SettingsError("--dry-run was given with --resume: a dry run keeps nothing; without --resume it works")


def estimate(recipe: Recipe, folder: Path, *, is_made: bool) -> str:
    """Returns two lines: the speed of the run in `folder`, and the time of the whole recipe at that speed.

    Seconds per image are those of the median step, in proportion to the pixels of an image in later epochs of another
    resolution. `is_made`: the evaluation set stands for ImageNet's.
    """
    events = read_events(folder / EVENTS_FILE)
    steps = [event for event in events if event["event"] == "step"][WARM_UP_STEPS:]
    evaluation = next(event for event in reversed(events) if event["event"] == "evaluation")
    images_per_s = statistics.median(event["images_per_s"] for event in steps)
    train_s = _relative_work(recipe, steps[-1]["resolution"]) * recipe.num_train_images / images_per_s
    each_s = evaluation["seconds"] * (NUM_EVAL_IMAGES / evaluation["num_samples"] if is_made else 1.0)
    total_s = train_s + recipe.num_evaluations * each_s
    step_s = statistics.median(event["global_batch_size"] / event["images_per_s"] for event in steps)
    return (
        f"dry run: {len(steps)} steps of {steps[-1]['global_batch_size']:,} images, median {step_s:.3f} s a step, "
        f"{images_per_s:,.0f} images/s; one evaluation {each_s:.1f} s\n"
        f"a whole run of {recipe.total_epochs:g} epochs: {duration(train_s)} of training and "
        f"{recipe.num_evaluations} "
        f"evaluations, {duration(total_s)} in all"
    )


def _relative_work(recipe: Recipe, resolution: int) -> float:
    """Epochs of a whole run, each weighted by its pixels per image relative to `resolution`."""
    num_whole, rest = divmod(recipe.total_epochs, 1.0)
    shares = itertools.chain(itertools.repeat(1.0, int(num_whole)), [rest])
    sizes = (
        resolution_at(min(epoch + 0.5, recipe.total_epochs), recipe.resolution, ramp=recipe.resolution_ramp)
        for epoch in itertools.count()
    )
    return sum(share * (size / resolution) ** 2 for share, size in zip(shares, sizes, strict=False))
