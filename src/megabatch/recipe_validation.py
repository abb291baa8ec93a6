"""Checks of a recipe's values: each field's range, and fields that depend on one another. No torch."""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from megabatch import model_names
from megabatch.errors import RecipeError
from megabatch.recipe_text import as_text

if TYPE_CHECKING:
    from megabatch.recipe import ByEpoch, Recipe

AnyRecipe = TypeVar("AnyRecipe", bound="Recipe")

MOST_STEPS = 10**9
"""Most updates of a run."""
_MOST = {
    "num_train_images": 10**12,
    "num_classes": 10**7,
    "image_channels": 1024,
    "width": 1 << 16,
    "eval_resolution": 65_500,
    "total_epochs": 10**6,
}
"""Largest value of fields that decide how much memory or time a run takes before its first step."""

_RANGES: tuple[tuple[str, Callable[[float], bool], object, str], ...] = (
    (
        "at least 1",
        lambda value: value >= 1,
        1,
        "rollback_checkpoints global_batch_size bn_span num_train_images num_classes image_channels width",
    ),
    (
        "above 0",
        lambda value: value > 0,
        1,
        "total_epochs eval_every_epochs poly_power lr_reference_batch_size bn_eps",
    ),
    (
        "0 or more",
        lambda value: value >= 0,
        0,
        "weight_decay peak_lr warmup_epochs warmup_start_lr end_lr ema_half_life_epochs early_stop_epochs "
        "early_stop_min_rise mixup_alpha cutmix_alpha trust_eps cutout_size crop_padding sgd_lr_factor",
    ),
    ("in [0, 1)", lambda value: 0 <= value < 1, 0.1, "momentum label_smoothing color_jitter beta2"),
    (
        "in (0, 1]",
        lambda value: 0 < value <= 1,
        0.1,
        "stats_momentum eval_crop_ratio max_crop_area min_crop_area layer_decay rollback_lr_factor",
    ),
    ("in [0, 1]", lambda value: 0 <= value <= 1, 0.25, "random_erasing class_weight_power"),
    ("1 to 8", lambda value: 1 <= value <= 8, 2, "rand_num_ops"),
    ("0 to 30", lambda value: 0 <= value <= 30, 9, "rand_magnitude"),
    ("above 0", lambda value: value > 0, 0.001, "trust_coefficient"),
    ("above 0", lambda value: value > 0, 10, "root_every_steps"),
)
"""What is needed, its test, a value that works, and the fields."""


def validate(recipe: AnyRecipe) -> AnyRecipe:
    """Returns `recipe` itself if its values are consistent.

    Raises:
        RecipeError: names the first invalid field and a value that works.
    """
    for needed, holds, example, fields in _RANGES:
        for field in fields.split():
            _require(holds(getattr(recipe, field)), recipe, field, needed, example)
    for field, most in _MOST.items():
        _require(getattr(recipe, field) <= most, recipe, field, f"at most {most:,}", 1)
    _check_model(recipe)
    _check_images(recipe)
    _check_epochs(recipe)
    _check_batches(recipe)
    return recipe


def _check_model(recipe: "Recipe") -> None:
    if fault := model_names.fault(recipe.model):
        raise RecipeError(f"model={recipe.model} was given, needed: {fault}")
    stems = model_names.STEMS.get(recipe.model, ("auto",))
    _require(recipe.stem in stems, recipe, "stem", f"one of {recipe.model}: {', '.join(stems)}", "auto")


def _check_images(recipe: "Recipe") -> None:
    _require(recipe.min_crop_area <= recipe.max_crop_area, recipe, "min_crop_area", "at most max_crop_area", 0.08)
    aspects = 0 < recipe.min_crop_aspect <= recipe.max_crop_aspect
    _require(aspects, recipe, "min_crop_aspect", "above 0 and at most max_crop_aspect", 0.75)
    global_order = recipe.sampling == "uniform" or not recipe.shard_local
    _require(global_order, recipe, "sampling", "uniform with shard_local=true", "uniform")
    corrected_once = recipe.sampling == "uniform" or not recipe.class_weight_power
    _require(corrected_once, recipe, "class_weight_power", "0 with sampling=balanced", 0)
    channels = recipe.image_channels
    middle, mean, std = (",".join([value] * channels) for value in ("0.5", "0.5", "0.25"))
    for field in ("pixel_mean", "pixel_std"):
        has_all = len(getattr(recipe, field)) == channels
        _require(has_all, recipe, field, f"one value per image channel ({channels})", middle)
    _require(all(0 <= m <= 1 for m in recipe.pixel_mean), recipe, "pixel_mean", "of pixels in [0, 1]", mean)
    _require(all(0 < s <= 1 for s in recipe.pixel_std), recipe, "pixel_std", "in (0, 1], of pixels in [0, 1]", std)


def _check_epochs(recipe: "Recipe") -> None:
    for field in ("resolution", "batch_sizes", "lr_factors", "published_curve"):
        _check_by_epoch(recipe, field)
    _require(bool(recipe.resolution), recipe, "resolution", "not empty", "0:224")
    sides = [side for _, side in recipe.resolution]
    _require(max(sides) <= _MOST["eval_resolution"], recipe, "resolution", "at most 65,500 pixels", 224)
    num_images = recipe.total_epochs * recipe.num_train_images
    _require(num_images >= 1, recipe, "total_epochs", "long enough for one image", 1)
    is_finite = num_images <= MOST_STEPS * recipe.smallest_batch
    _require(is_finite, recipe, "total_epochs", f"at most {MOST_STEPS:,} updates, or a larger batch", 1)
    has_factors = recipe.decay not in {"step", "piecewise"} or bool(recipe.lr_factors)
    _require(has_factors, recipe, "lr_factors", f"given when decay={recipe.decay}", "0:1,30:0.1")
    total = recipe.total_epochs
    shorter = f"shorter than total_epochs={total:g}"
    _require(recipe.warmup_epochs < total, recipe, "warmup_epochs", shorter, f"{total / 5:g}")


def _check_batches(recipe: "Recipe") -> None:
    batches = [
        ("global_batch_size=", recipe.global_batch_size),
        ("max_global_batch_size=", recipe.max_global_batch_size),
    ]
    batches += [("batch_sizes=0:", int(size)) for _, size in recipe.batch_sizes]
    for key, batch in batches:
        if batch % recipe.bn_span:
            good = max(recipe.bn_span, round(batch / recipe.bn_span) * recipe.bn_span)
            raise RecipeError(
                f"a global batch of {batch} images does not divide into batch-norm spans of bn_span={recipe.bn_span}; "
                f"{key}{good} works"
            )
    if recipe.max_global_batch_size and recipe.batch_sizes:
        raise RecipeError(
            "batch_sizes (a fixed schedule) and max_global_batch_size (growth by noise scale) contradict each other; "
            "max_global_batch_size=0 keeps the schedule"
        )


def _check_by_epoch(recipe: "Recipe", field: str) -> None:
    pairs: ByEpoch = getattr(recipe, field)
    epochs = [epoch for epoch, _ in pairs]
    ascending = all(a < b for a, b in itertools.pairwise(epochs))
    starts_at_0 = field == "published_curve" or not pairs or epochs[0] == 0
    _require(ascending and starts_at_0, recipe, field, "ascending epochs that start at 0", "0:1,30:2")
    positive = all(value >= (0 if field in {"lr_factors", "published_curve"} else 1) for _, value in pairs)
    _require(positive, recipe, field, "values of at least 1 (rates and accuracies: 0)", "0:1,30:2")


def _require(holds: bool, recipe: "Recipe", field: str, needed: str, example: object) -> None:
    if not holds:
        given = getattr(recipe, field)
        raise RecipeError(f"{field}={as_text(given)} was given, needed: {needed}; {field}={example} works")
