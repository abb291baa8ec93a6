"""`Recipe`: every setting that can change the trained weights in exact arithmetic. Imports no torch.

A recipe is written for a global batch and runs on any number of workers: no field depends on the machine.
`override` applies `key=value` texts and checks their types; `validate` rejects contradictory values.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megabatch.errors import RecipeError
from megabatch.files import read_json
from megabatch.recipe_text import as_text, conforms, parse, suggestion
from megabatch.recipe_validation import validate

Stem = Literal["auto", "small", "large", "pooled", "whitened"]
Freeze = Literal["none", "backbone"]
Initialization = Literal["he_fan_out", "he_fan_in", "lecun_truncated", "alexnet"]
Augmentation = Literal["none", "pad_crop", "random_resized_crop"]
AutoAugment = Literal["none", "randaugment", "trivialaugment"]
Sampling = Literal["uniform", "balanced"]
Optimizer = Literal["lars", "lamb", "sgd", "rmsprop_warmup", "muon", "shampoo"]
MomentumForm = Literal["outside", "inside", "inside_corrected"]
TrustDenominator = Literal["sum", "update", "gradient"]
MuonScale = Literal["spectral", "rms", "none"]
Graft = Literal["sgd", "lars"]
Warmup = Literal["none", "linear", "constant"]
Decay = Literal["constant", "poly", "cosine", "step", "piecewise", "slow_start"]
Scaling = Literal["none", "linear", "sqrt"]
BatchSizeRule = Literal["fixed", "linear", "sqrt", "noise_scale"]
OnNonFinite = Literal["stop", "skip", "rollback"]
EvalStats = Literal["running", "running_all_reduced", "last_batch", "precise"]

ByEpoch = tuple[tuple[float, float], ...]
"""Pairs `(from_epoch, value)`, ascending, the first at epoch 0; written `0:160,13:192` on the command line."""

DESCRIPTIVE_FIELDS = frozenset(
    {"name", "eval_every_epochs", "eval_offset_epochs", "target_top1", "published_top1", "published_curve"}
    | {"on_non_finite", "rollback_checkpoints", "rollback_lr_factor", "early_stop_epochs", "early_stop_min_rise"}
)
"""Fields in which a resumed run may differ: they change no weights up to the checkpoint that it resumes from."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Model, data, batch, loss, optimizer and schedule of one training run.

    Epochs are fractional passes over `num_train_images`; batch sizes count images over all workers; resolutions are in
    pixels. `peak_lr` applies at `lr_reference_batch_size` images, or unscaled with `lr_scaling="none"`.
    """

    name: str

    # Model
    model: str  # resnet8, 18, 34, 50, vgg8, alexnet, alexnet_bn, timm:NAME, torchvision:NAME, or FILE.py:FUNCTION
    stem: Stem = "auto"  # ResNet-18 to 50: small (3x3, auto to 64 px), large (7x7); resnet8: pooled; vgg8: whitened
    initialization: Initialization = "he_fan_out"
    zero_gamma: bool = True  # the last batch norm of a residual block starts at 0 (Goyal et al. 2017, 5.1)
    blur_pool: bool = False  # antialiased downsampling (Zhang 2019)
    width: int = 16  # channels of the first stage; resnet8 and vgg8 only
    initial_weights: str = ""  # first 16 digits of the SHA-256 of the file given as --init-from, which sets it
    freeze: Freeze = "none"  # backbone: only the last layer is trained, and batch norms keep their averages
    layer_decay: float = 1.0  # rate of a layer: lr * layer_decay^(layers between it and the last); docs/models.md

    # Data. The three counts are those of the recipe's data set; another data folder replaces them.
    dataset: str
    num_train_images: int
    num_classes: int
    image_channels: int = 3
    pixel_mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of pixels in [0, 1]
    pixel_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    resolution: ByEpoch = ((0.0, 224.0),)  # side of a training image in pixels, by epoch
    resolution_ramp: bool = False  # True: linear between entries, in multiples of 32; False: jumps
    eval_resolution: int = 224
    eval_crop_ratio: float = 0.875  # side of the centre crop / shorter side of the image
    eval_flip: bool = False  # evaluate the mean of the logits of an image and its mirror image
    augmentation: Augmentation = "random_resized_crop"
    crop_padding: int = 4  # pad_crop only
    min_crop_area: float = 0.08
    max_crop_area: float = 1.0
    min_crop_aspect: float = 0.75
    max_crop_aspect: float = 4 / 3
    flip: bool = True
    alternate_flip: bool = False  # with flip: every image changes sides from epoch to epoch (Jordan 2024)
    cutout_size: int = 0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    color_jitter: float = 0.0  # brightness and contrast are scaled by a factor in [1 - j, 1 + j]
    auto_augment: AutoAugment = "none"
    rand_num_ops: int = 2  # randaugment only
    rand_magnitude: float = 9.0  # randaugment only; 0 to 30
    random_erasing: float = 0.0  # probability that a rectangle is set to the mean
    augmentation_ends_epoch: float | None = None  # only flips from this epoch on (Fujitsu, MLPerf v0.6)
    sampling: Sampling = "uniform"  # balanced: every class has equally many places in an epoch; small ones repeat
    shard_local: bool = False  # shuffle within windows of a few shards, for remote or slow storage

    # Batch
    global_batch_size: int
    batch_sizes: ByEpoch = ()  # batch-size control: replaces `global_batch_size`
    batch_size_rule: BatchSizeRule = "fixed"  # correction of lr and momentum, optim/batch_size.py
    max_global_batch_size: int = 0  # > 0: grow the batch with the gradient noise scale, up to this size
    total_epochs: float
    bn_span: int  # samples per batch-norm statistic
    bn_eps: float = 1e-5
    stats_momentum: float = 0.1  # weight of the newest statistic in the running average (PyTorch's convention)
    eval_stats: EvalStats = "running_all_reduced"
    precise_batches: int = 50  # global batches that eval_stats=precise averages over

    # Loss. A loss or gradient that is not finite ends the run, is left out, or goes back to an earlier checkpoint
    label_smoothing: float = 0.0
    class_weight_power: float = 0.0  # loss of class c times n_c^-power, of mean 1; 1: n / (K n_c); docs/data.md
    on_non_finite: OnNonFinite = "stop"
    rollback_checkpoints: int = 1  # rollback: 1 is the newest checkpoint, 2 the one before it
    rollback_lr_factor: float = 0.5  # rollback: factor of all rates from there on

    # Optimizer
    optimizer: Optimizer
    peak_lr: float
    momentum: float = 0.9
    nesterov: bool = False
    momentum_form: MomentumForm = "outside"  # place of lr: v=mv+u, w-=lr*v | v=mv+lr*u, w-=v | m*lr_t/lr_(t-1)
    weight_decay: float = 0.0
    weight_decay_follows_lr: bool = False  # a second factor lr / peak_lr in the decay; see docs/decisions/0007
    decay_norm_and_bias: bool = False
    trust_coefficient: float = 0.001
    trust_denominator: TrustDenominator = "sum"  # |g| + wd |w|, |g + wd w|, or |g|
    trust_eps: float = 0.0
    trust_clip: bool = False  # min(trust ratio / lr, 1), as in LARC
    beta2: float = 0.999  # LAMB, Shampoo
    rmsprop_lr: float = 3e-4
    rmsprop_center_epoch: float = 10.0
    rmsprop_period_epochs: float = 5.0
    muon_scale: MuonScale = "spectral"  # factor of a matrix's rate: sqrt(max(1, out/in)), 0.2 sqrt(max(out, in)), 1
    normalize_weights: bool = False  # Muon: each filter bank has norm sqrt(out) before its step
    graft: Graft = "sgd"  # Shampoo: whose step takes the preconditioned gradient
    root_every_steps: int = 10  # Shampoo
    sgd_lr_factor: float = 1.0  # Muon, Shampoo: rate of tensors that step by SGD, relative to that of the matrices
    ema_half_life_epochs: float = 0.0  # > 0: evaluate an average of the weights with this half-life

    # Schedule
    lr_scaling: Scaling = "none"  # peak_lr times (batch / lr_reference_batch_size) or its root
    lr_reference_batch_size: int = 256
    warmup: Warmup = "linear"
    warmup_epochs: float = 0.0
    warmup_start_lr: float = 0.0
    decay: Decay = "poly"
    poly_power: float = 2.0
    end_lr: float = 0.0
    decay_epochs: float | None = None  # length after warm-up; None: until training ends
    decay_counts_warmup: bool = False  # poly, cosine: from epoch 0 (Caffe) or from the end of warm-up (TF)
    lr_factors: ByEpoch = ()  # factors of the peak rate: decay=step jumps, decay=piecewise is linear between entries

    seed: int = 0

    # Published results and evaluation times
    eval_every_epochs: float = 1.0
    eval_offset_epochs: float = 0.0
    early_stop_epochs: float = 0.0  # > 0: end after this many epochs whose evaluations bring no better top-1
    early_stop_min_rise: float = 0.0  # smallest rise of top-1, in [0, 1], that counts as better
    target_top1: float | None = None
    published_top1: float | None = None
    published_curve: ByEpoch = ()  # (epoch, top1)

    def batch_at(self, epoch: float) -> int:
        """Scheduled global batch size at `epoch`, in images; growth with the noise scale is not included."""
        return int(value_at(self.batch_sizes, epoch)) if self.batch_sizes else self.global_batch_size

    @property
    def smallest_batch(self) -> int:
        """Smallest global batch size of the run, in images, apart from its last update."""
        return min(self._scheduled_batches())

    @property
    def largest_batch(self) -> int:
        """Largest global batch size that the run can reach, in images, `max_global_batch_size` included."""
        return max(*self._scheduled_batches(), self.max_global_batch_size)

    @property
    def num_evaluations(self) -> int:
        """Evaluations of a whole run: at `offset + k every` epochs between start and end, and at the end."""
        between = int((self.total_epochs - self.eval_offset_epochs - 1e-9) / self.eval_every_epochs)
        return between + (self.eval_offset_epochs > 0) + 1

    def _scheduled_batches(self) -> list[int]:
        return [int(size) for _, size in self.batch_sizes] or [self.global_batch_size]


def override(recipe: Recipe, settings: Mapping[str, str]) -> Recipe:
    """Returns a validated copy of `recipe` with `settings`, texts by field name, parsed to the fields' types.

    A new `total_epochs` also scales warm-up, decay and all epoch schedules, unless `settings` holds them too.

    Raises:
        RecipeError: an unknown key (the message suggests a field), a text that does not parse as the field's type, or
            values that contradict each other.
    """
    changes = parse_settings(settings, recipe)
    if "total_epochs" in changes:
        changes = _fit_warmup(recipe, changes)
    return validate(dataclasses.replace(recipe, **changes))


def parse_settings(settings: Mapping[str, str], current: Recipe | None = None) -> dict[str, Any]:
    """Returns `settings`, texts by field name, parsed to the fields' types; an error suggests the `current` value."""
    hints = typing.get_type_hints(Recipe)
    changes: dict[str, Any] = {}
    for key, text in settings.items():
        if key not in hints:
            raise RecipeError(f"unknown recipe key '{key}'; {suggestion(key, list(hints))}")
        changes[key] = _parse(key, text, hints[key], current)
    return changes


def fields_as_json(recipe: Recipe) -> dict[str, Any]:
    """Returns every field as a JSON value (tuples become lists); `from_json` is the inverse."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return values


def from_json(values: Mapping[str, Any]) -> Recipe:
    """Returns the recipe with these `fields_as_json`.

    Raises:
        RecipeError: an unknown or missing field, a value of another type, or contradictory values.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"a recipe is a JSON object, not a {type(values).__name__}; the recipe.json of a run works")
    hints = typing.get_type_hints(Recipe)
    if unknown := sorted(map(str, set(values) - set(hints))):
        raise RecipeError(f"recipe has unknown fields: {', '.join(unknown)}; remove them")
    fields = {key: _tuples(value) for key, value in values.items()}
    for key, value in fields.items():
        if not conforms(value, hints[key]):
            raise RecipeError(
                f"recipe field {key} is {str(value)[:100]}, which is not of its type ({_type_text(hints[key])})"
            )
    try:
        recipe = Recipe(**fields)
    except TypeError as error:
        raise RecipeError(f"recipe is incomplete: {error}") from error
    return validate(recipe)


def read(path: Path) -> Recipe:
    """Returns the recipe in `path`, the `recipe.json` of a run folder; raises RecipeError if it is not one."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return from_json(values)


def differing_fields(one: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Returns the fields that can change the weights and differ between the recipes, with both values."""
    return {
        f.name: (getattr(one, f.name), getattr(other, f.name))
        for f in dataclasses.fields(Recipe)
        if f.name not in DESCRIPTIVE_FIELDS and getattr(one, f.name) != getattr(other, f.name)
    }


def value_at(by_epoch: ByEpoch, epoch: float) -> float:
    """Returns the value of the last entry that starts at or before `epoch`."""
    value = by_epoch[0][1]
    for start, entry in by_epoch:
        if start <= epoch:
            value = entry
    return value


def _fit_warmup(recipe: Recipe, changes: dict[str, Any]) -> dict[str, Any]:
    """Adds scaled epochs of warm-up, decay and schedules to `changes`, which holds a new `total_epochs`.

    With a tenth of the epochs the schedule keeps its shape; otherwise the run could end within warm-up. Fields already
    in `changes` stay as they are.
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


def _parse(key: str, text: str, hint: Any, current: Recipe | None) -> Any:
    """Returns `text` as a value of type `hint`; a RecipeError suggests the `current` value."""
    try:
        return parse(text.strip(), hint)
    except ValueError as error:
        works = f"; {key}={as_text(getattr(current, key))} works" if current else ""
        raise RecipeError(f"{key}={text}: {error}{works}") from None


def _type_text(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
