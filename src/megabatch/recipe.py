"""`Recipe`: everything that may change the trained weights in exact arithmetic. Facts only, no torch.

A recipe is written once for a global batch and runs on any number of workers: nothing in it names a machine.
`override` applies `key=value` texts with their types checked; `validate` refuses contradictions.
"""

import dataclasses
import itertools
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from megabatch.errors import RecipeError

Model = Literal["resnet8", "resnet18", "resnet34", "resnet50", "alexnet", "alexnet_bn"]
Initialization = Literal["he_fan_out", "he_fan_in", "lecun_truncated", "alexnet"]
Augmentation = Literal["none", "pad_crop", "random_resized_crop"]
Optimizer = Literal["lars", "lamb", "sgd", "rmsprop_warmup"]
MomentumForm = Literal["outside", "inside", "inside_corrected"]
TrustDenominator = Literal["sum", "update", "gradient"]
Warmup = Literal["none", "linear", "constant"]
Decay = Literal["constant", "poly", "cosine", "step", "piecewise", "slow_start"]
Scaling = Literal["none", "linear", "sqrt"]
BatchSizeRule = Literal["fixed", "linear", "sqrt", "noise_scale"]
EvalStats = Literal["running", "running_all_reduced", "last_batch", "precise"]

ByEpoch = tuple[tuple[float, float], ...]
"""Pairs `(from_epoch, value)`, ascending, the first at epoch 0; written `0:160,13:192` on the command line."""

DESCRIPTIVE_FIELDS = frozenset(
    {"name", "eval_every_epochs", "eval_offset_epochs", "target_top1", "published_top1", "published_curve"}
)
"""Fields that say something about a run and cannot change its weights; a resumed run may differ in them."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained. Epochs are fractional; batch sizes are global; rates are for `lr_reference_batch_size`."""

    name: str

    # Model
    model: Model
    initialization: Initialization = "he_fan_out"
    zero_gamma: bool = True  # the last batch norm of a residual block starts at 0 (Goyal et al. 2017, 5.1)
    blur_pool: bool = False  # antialiased downsampling (Zhang 2019)
    width: int = 16  # channels of the first stage; resnet8 only

    # Data. The three counts describe the data set the recipe is written for; a folder given instead replaces them.
    dataset: str
    num_train_images: int
    num_classes: int
    image_channels: int = 3
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of pixels in [0, 1]
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resolution: ByEpoch = ((0.0, 224.0),)  # training pixels by epoch
    resolution_ramp: bool = False  # between two entries: True goes linearly in multiples of 32, False jumps
    eval_resolution: int = 224
    eval_crop_ratio: float = 0.875  # centre crop / shorter side
    augmentation: Augmentation = "random_resized_crop"
    crop_padding: int = 4  # pad_crop only
    min_crop_area: float = 0.08
    max_crop_area: float = 1.0
    min_crop_aspect: float = 0.75
    max_crop_aspect: float = 4 / 3
    flip: bool = True
    cutout_size: int = 0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    color_jitter: float = 0.0  # brightness and contrast are scaled by a factor in [1 - j, 1 + j]
    augmentation_ends_epoch: float | None = None  # from here on only flips (Fujitsu, MLPerf v0.6)
    shard_local: bool = False  # samples are shuffled within windows of a few shards, for storage that is far or slow

    # Batch
    global_batch_size: int
    batch_sizes: ByEpoch = ()  # batch-size control: overrides `global_batch_size` from each epoch on
    batch_size_rule: BatchSizeRule = "fixed"  # what follows a change of the batch: see optim/batch_size.py
    max_global_batch_size: int = 0  # > 0: grow the batch up to here as the gradient noise scale grows
    total_epochs: float
    bn_span: int  # samples per batch-norm statistic
    bn_eps: float = 1e-5
    stats_momentum: float = 0.1  # weight of the newest statistic in the running average (PyTorch's convention)
    eval_stats: EvalStats = "running_all_reduced"
    precise_batches: int = 50  # global batches behind eval_stats=precise

    # Loss
    label_smoothing: float = 0.0

    # Optimizer
    optimizer: Optimizer
    peak_lr: float
    momentum: float = 0.9
    nesterov: bool = False
    momentum_form: MomentumForm = "outside"  # where the rate is: v=mv+u, w-=lr*v | v=mv+lr*u, w-=v | m*lr_t/lr_(t-1)
    weight_decay: float = 0.0
    weight_decay_follows_lr: bool = False  # times lr / peak_lr, besides the lr in the update; see docs/decisions/0007
    decay_norm_and_bias: bool = False
    trust_coefficient: float = 0.001
    trust_denominator: TrustDenominator = "sum"  # |g| + wd |w|, |g + wd w|, or |g|
    trust_eps: float = 0.0
    trust_clip: bool = False  # trust ratio / lr at most 1
    beta2: float = 0.999  # LAMB
    rmsprop_lr: float = 3e-4
    rmsprop_center_epoch: float = 10.0
    rmsprop_period_epochs: float = 5.0
    ema_half_life_epochs: float = 0.0  # > 0: evaluate an average of the weights with this half-life

    # Schedule
    lr_scaling: Scaling = "none"  # how `peak_lr` follows global_batch_size / lr_reference_batch_size
    lr_reference_batch_size: int = 256
    warmup: Warmup = "linear"
    warmup_epochs: float = 0.0
    warmup_start_lr: float = 0.0
    decay: Decay = "poly"
    poly_power: float = 2.0
    end_lr: float = 0.0
    decay_epochs: float | None = None  # length of the decay after warm-up; None: to the end of training
    decay_counts_warmup: bool = False  # poly and cosine measured from epoch 0 (Caffe) or from the warm-up's end (TF)
    lr_factors: ByEpoch = ()  # decay=step: factors of the peak rate; decay=piecewise: rates joined by lines

    seed: int = 0

    # What is known of it, and when to look
    eval_every_epochs: float = 1.0
    eval_offset_epochs: float = 0.0
    target_top1: float | None = None
    published_top1: float | None = None
    published_curve: ByEpoch = ()  # (epoch, top1)


def override(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """A copy of `recipe` with `key=value` texts parsed to the fields' types, and validated.

    Raises:
        RecipeError: unknown key (the nearest is named), a text that is not of the field's type, or values that
            contradict one another.
    """
    hints = typing.get_type_hints(Recipe)
    changes: dict[str, Any] = {}
    for key, text in settings.items():
        if key not in hints:
            near = get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "`megabatch recipes NAME` shows every key"
            raise RecipeError(f"unknown recipe key '{key}'; {hint}")
        changes[key] = _parse(key, text, hints[key], getattr(recipe, key))
    if "total_epochs" in changes:
        changes = _fit_warmup(recipe, changes)
    return validate(dataclasses.replace(recipe, **changes))


def validate(recipe: Recipe) -> Recipe:
    """`recipe` itself, if its values fit together; RecipeError naming the first that does not, with one that does."""
    for field in ("global_batch_size", "bn_span", "num_train_images", "num_classes", "image_channels", "width"):
        _require(getattr(recipe, field) >= 1, recipe, field, "at least 1", 1)
    for field in ("total_epochs", "eval_every_epochs", "poly_power", "lr_reference_batch_size", "bn_eps"):
        _require(getattr(recipe, field) > 0, recipe, field, "above 0", 1)
    for field in ("weight_decay", "peak_lr", "warmup_epochs", "warmup_start_lr", "end_lr", "ema_half_life_epochs"):
        _require(getattr(recipe, field) >= 0, recipe, field, "0 or more", 0)
    for field in ("mixup_alpha", "cutmix_alpha", "trust_eps", "cutout_size", "crop_padding"):
        _require(getattr(recipe, field) >= 0, recipe, field, "0 or more", 0)
    for field in ("momentum", "label_smoothing", "color_jitter", "beta2"):
        _require(0 <= getattr(recipe, field) < 1, recipe, field, "in [0, 1)", 0.1)
    for field in ("stats_momentum", "eval_crop_ratio", "max_crop_area", "min_crop_area"):
        _require(0 < getattr(recipe, field) <= 1, recipe, field, "in (0, 1]", 0.1)
    _require(recipe.min_crop_area <= recipe.max_crop_area, recipe, "min_crop_area", "at most max_crop_area", 0.08)
    _require(recipe.min_crop_aspect <= recipe.max_crop_aspect, recipe, "min_crop_aspect", "at most its maximum", 0.75)
    _require(recipe.trust_coefficient > 0, recipe, "trust_coefficient", "above 0", 0.001)
    for field in ("pixel_mean", "pixel_std"):
        _require(
            len(getattr(recipe, field)) == recipe.image_channels,
            recipe,
            field,
            f"one value per image channel ({recipe.image_channels})",
            ",".join(["0.5"] * recipe.image_channels),
        )
    _require(all(s > 0 for s in recipe.pixel_std), recipe, "pixel_std", "above 0", "0.25")
    for field in ("resolution", "batch_sizes", "lr_factors", "published_curve"):
        _check_by_epoch(recipe, field)
    _require(bool(recipe.resolution), recipe, "resolution", "not empty", "0:224")
    _require(
        recipe.decay not in {"step", "piecewise"} or bool(recipe.lr_factors),
        recipe,
        "lr_factors",
        f"given when decay={recipe.decay}",
        "0:1,30:0.1",
    )
    _require(
        recipe.warmup_epochs < recipe.total_epochs,
        recipe,
        "warmup_epochs",
        f"shorter than total_epochs={recipe.total_epochs:g}",
        f"{recipe.total_epochs / 5:g}",
    )
    _check_batches(recipe)
    return recipe


def _check_batches(recipe: Recipe) -> None:
    batches = [recipe.global_batch_size, *(int(size) for _, size in recipe.batch_sizes)]
    if recipe.max_global_batch_size:
        batches.append(recipe.max_global_batch_size)
    for batch in batches:
        if batch % recipe.bn_span:
            good = max(recipe.bn_span, round(batch / recipe.bn_span) * recipe.bn_span)
            raise RecipeError(
                f"global batch {batch} does not divide into batch-norm spans of bn_span={recipe.bn_span} samples; "
                f"global_batch_size={good} works"
            )
    if recipe.max_global_batch_size and recipe.batch_sizes:
        raise RecipeError(
            "batch_sizes (a fixed schedule) and max_global_batch_size (growth by noise scale) contradict each other; "
            "max_global_batch_size=0 keeps the schedule"
        )


def fields_as_json(recipe: Recipe) -> dict[str, Any]:
    """Every field as JSON values (tuples become lists); `from_json` is the inverse."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return values


def from_json(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `fields_as_json` described; RecipeError for unknown or missing fields."""
    known = {f.name for f in dataclasses.fields(Recipe)}
    if unknown := sorted(set(values) - known):
        raise RecipeError(f"recipe holds unknown fields: {', '.join(unknown)}")
    try:
        return validate(Recipe(**{key: _tuples(value) for key, value in values.items()}))
    except TypeError as error:
        raise RecipeError(f"recipe is incomplete: {error}") from error


def read(path: Path) -> Recipe:
    """The recipe in a run folder's `recipe.json`."""
    return from_json(json.loads(path.read_text()))


def differing_fields(one: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Fields that can change the weights and are not equal, with both values."""
    return {
        f.name: (getattr(one, f.name), getattr(other, f.name))
        for f in dataclasses.fields(Recipe)
        if f.name not in DESCRIPTIVE_FIELDS and getattr(one, f.name) != getattr(other, f.name)
    }


def value_at(by_epoch: ByEpoch, epoch: float) -> float:
    """The value of the last entry that starts at or before `epoch`."""
    value = by_epoch[0][1]
    for start, entry in by_epoch:
        if start <= epoch:
            value = entry
    return value


def _fit_warmup(recipe: Recipe, changes: dict[str, Any]) -> dict[str, Any]:
    """Scales epochs of warm-up, decay and steps with `total_epochs`, unless the user sets them too.

    A user who asks for a tenth of the epochs wants the same curve in a tenth of the time, not a run that ends in
    warm-up.
    """
    ratio = changes["total_epochs"] / recipe.total_epochs
    if ratio <= 0:
        return changes
    for field in ("warmup_epochs", "decay_epochs", "augmentation_ends_epoch", "rmsprop_center_epoch"):
        value = getattr(recipe, field)
        if value:
            changes.setdefault(field, value * ratio)
    changes.setdefault("rmsprop_period_epochs", recipe.rmsprop_period_epochs * ratio)
    for field in ("resolution", "batch_sizes", "lr_factors"):
        changes.setdefault(field, tuple((epoch * ratio, value) for epoch, value in getattr(recipe, field)))
    return changes


def _check_by_epoch(recipe: Recipe, field: str) -> None:
    pairs: ByEpoch = getattr(recipe, field)
    epochs = [epoch for epoch, _ in pairs]
    ascending = all(a < b for a, b in itertools.pairwise(epochs))
    starts = field == "published_curve" or not pairs or epochs[0] == 0
    _require(ascending and starts, recipe, field, "ascending epochs that start at 0", "0:1,30:2")
    positive = all(value >= (0 if field in {"lr_factors", "published_curve"} else 1) for _, value in pairs)
    _require(positive, recipe, field, "values of at least 1 (rates: 0)", "0:1,30:2")


def _require(holds: bool, recipe: Recipe, field: str, needed: str, example: object) -> None:
    if not holds:
        given = getattr(recipe, field)
        raise RecipeError(f"{field}={given} was given, needed: {needed}; for example {field}={example}")


def _parse(key: str, text: str, hint: Any, current: Any) -> Any:
    """The value of `text` as type `hint`; RecipeError with the current value as one that works."""
    try:
        return _parse_as(text.strip(), hint)
    except ValueError as error:
        raise RecipeError(f"{key}={text}: {error}; {key}={_as_text(current)} works") from None


def _parse_as(text: str, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if text not in args:
            raise ValueError(f"needed one of {', '.join(args)}")
        return text
    if origin is types.UnionType:
        return None if text.lower() in {"none", ""} else _parse_as(text, args[0])
    if hint == ByEpoch:
        return _parse_by_epoch(text)
    if origin is tuple:
        return tuple(_parse_as(part, float) for part in text.split(",") if part)
    if hint is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError("needed true or false")
        return words[text.lower()]
    if hint is int:
        return _parse_int(text)
    if hint is float:
        return _parse_float(text)
    return text


def _parse_int(text: str) -> int:
    try:
        return int(text.replace("_", ""))
    except ValueError:
        raise ValueError("needed a whole number") from None


def _parse_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError("needed a number") from None
    if not math.isfinite(number):
        raise ValueError("needed a finite number")
    return number


def _parse_by_epoch(text: str) -> ByEpoch:
    if not text or text.lower() == "none":
        return ()
    parts = text.split(",")
    if len(parts) == 1 and ":" not in text:
        return ((0.0, _parse_float(text)),)
    pairs = [part.partition(":") for part in parts]
    if not all(colon for _, colon, _ in pairs):
        raise ValueError("needed epoch:value pairs such as 0:160,13:192")
    return tuple((_parse_float(epoch), _parse_float(value)) for epoch, _, value in pairs)


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(":".join(f"{v:g}" for v in x) if isinstance(x, tuple) else f"{x:g}" for x in value) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
