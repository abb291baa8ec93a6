"""The recipe's model and optimizer."""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megabatch import model_names
from megabatch.app.initial_weights import match_weights
from megabatch.app.span_tiles import span_tiles
from megabatch.comm.launch import World
from megabatch.errors import SettingsError
from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics, span_layers
from megabatch.nn.batch_norm.layer import convert
from megabatch.nn.fused.fuse import can_fuse, set_fusion
from megabatch.nn.fused.models import FusedResNet
from megabatch.nn.fused.stem import WIDTH
from megabatch.nn.initialize import initialize
from megabatch.nn.levels import freeze_backbone, levels
from megabatch.nn.library_models import create_library_model
from megabatch.nn.models import create_model
from megabatch.optim.groups import param_groups, split_by_level
from megabatch.optim.lamb import LAMB
from megabatch.optim.lars import LARS
from megabatch.optim.muon import Muon
from megabatch.optim.rmsprop_warmup import RMSpropWarmup
from megabatch.optim.sgd import SGD
from megabatch.optim.shampoo import Shampoo
from megabatch.recipe import Recipe
from megabatch.runtime import Runtime
from megabatch.train.precision import Precision, widen_logits
from megabatch.train.schedule import peak_lr
from megabatch.user_code import load_function, short_name


def make_model(recipe: Recipe, code: str | None = None) -> nn.Module:
    """The recipe's model with torch's batch norms and random weights.

    A model of timm, torchvision or a file has its own initialisation and keeps the `eps` of its batch norms; torch's
    generator is seeded with the recipe's seed for it, and is restored.

    Args:
        code: the model that the user named. A function of a file is run only if it is this one.

    Raises:
        SettingsError: the model cannot be made, `code` is another one, or it is a function and `code` is None.
    """
    if code is not None and short_name(code) != recipe.model:
        raise SettingsError(f"--model {code} was given, and the checkpoint's model is {recipe.model}; omit --model")
    if model_names.is_own(recipe.model):
        return create_model(
            recipe.model,
            num_classes=recipe.num_classes,
            in_channels=recipe.image_channels,
            norm=functools.partial(nn.BatchNorm2d, eps=recipe.bn_eps),
            zero_gamma=recipe.zero_gamma,
            blur_pool=recipe.blur_pool,
            width=recipe.width,
            image_size=_sizes(recipe)[-1],
            stem=recipe.stem,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if library := model_names.split_library(recipe.model):
            return create_library_model(
                *library,
                num_classes=recipe.num_classes,
                in_channels=recipe.image_channels,
                image_sizes=_sizes(recipe),
            )
        return _made_by_function(recipe, code)


def memory_format(runtime: Runtime) -> torch.memory_format:
    """Layout of images and weights: channels_last unless the runtime says otherwise."""
    return torch.contiguous_format if runtime.channels_last is False else torch.channels_last


class ImageFormat(NamedTuple):
    """Dtype of the training images, and their channels with zeros behind them; None for no such channels."""

    dtype: torch.dtype = torch.float32
    padded_channels: int | None = None


def image_format(runtime: Runtime, module: nn.Module, precision: Precision, device: torch.device) -> ImageFormat:
    """What the first convolution reads: on a GPU the precision's 16 bits, and for a fused stem its `WIDTH` channels."""
    if device.type != "cuda" or precision.name == "fp32":
        return ImageFormat()
    pads = isinstance(module, FusedResNet) and module.conv1.in_channels < WIDTH and runtime.channels_last is not False
    return ImageFormat(precision.dtype, WIDTH if pads else None)


def _sizes(recipe: Recipe) -> tuple[int, ...]:
    """Image sizes of evaluation and training, in pixels, the largest training size last."""
    return (recipe.eval_resolution, *sorted(int(value) for _, value in recipe.resolution))


def _made_by_function(recipe: Recipe, code: str | None) -> nn.Module:
    """The model that the user's function returns, checked by a forward of two images of zeros."""
    if code is None:
        raise SettingsError(
            f"the recipe's model is the function {recipe.model}, and megabatch runs a file only if you name it; "
            f"--model PATH/{recipe.model} works (in Python, model=)"
        )
    model = load_function("--model", code)(num_classes=recipe.num_classes, in_channels=recipe.image_channels)
    if not isinstance(model, nn.Module):
        raise SettingsError(f"--model {code} returned {type(model).__name__}, needed: a torch.nn.Module")
    images = torch.zeros(2, recipe.image_channels, recipe.eval_resolution, recipe.eval_resolution)
    with torch.inference_mode():
        logits = model.eval()(images)
    model.train()
    if not isinstance(logits, Tensor) or logits.shape != (2, recipe.num_classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SettingsError(
            f"--model {code}: of images {tuple(images.shape)} it computed {found}, needed: logits "
            f"(2, {recipe.num_classes})"
        )
    return model


def unsafe_convolution(recipe: Recipe, code: str | None = None) -> str | None:
    """Describes a convolution that can corrupt memory in channels_last on a CPU, or returns None.

    PyTorch 2.13 with oneDNN, on a processor with AVX2 only, corrupts the heap in the float32 backward of a 1x1
    convolution with stride 2 and 2 to 5 input channels in channels_last. Fewer than 8 channels are avoided.
    """
    is_own = model_names.is_own(recipe.model)
    with torch.device("meta") if is_own else contextlib.nullcontext():  # other models may compute when made
        model = make_model(recipe, code)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and _is_unsafe(layer):
            return f"{name}, a 1x1 convolution of stride {layer.stride[0]} with {layer.in_channels} channels"
    return None


def _is_unsafe(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and max(layer.stride) > 1 and 1 < layer.in_channels // layer.groups < 8


def build_model(
    recipe: Recipe,
    runtime: Runtime,
    *,
    world: World,
    micro_batch_size: int,
    initial: Mapping[str, Tensor] | None = None,
    stem_weight: Tensor | None = None,
) -> nn.Module:
    """The recipe's model, equal on every worker: weights from the seed alone, or those given where they fit."""
    groups = span_tiles(recipe, runtime, world=world, micro_batch_size=micro_batch_size)
    model = make_model(recipe, runtime.model)
    if model_names.is_own(recipe.model):
        initialize(model, recipe.initialization, seed=recipe.seed, zero_gamma=recipe.zero_gamma)
    if stem_weight is not None:
        model.load_state_dict({"stem.weight": stem_weight}, strict=False)
    if initial is not None:
        model.load_state_dict(match_weights(model, initial).tensors, strict=False)
    with_spans(recipe, model, process_group=groups.new_group(), group_size=groups.size)
    if recipe.freeze == "backbone":
        freeze_backbone(model)
    if can_fuse(model):
        set_fusion(model, runtime.fusion)
    widen_logits(model)
    return model.to(world.device, memory_format=memory_format(runtime))  # type: ignore[call-overload, no-any-return]


def with_spans(
    recipe: Recipe, model: nn.Module, *, process_group: dist.ProcessGroup | None = None, group_size: int = 1
) -> None:
    """Gives the batch norms of `model` the recipe's span and averages, in place."""
    convert(model, span=recipe.bn_span, process_group=process_group, group_size=group_size)
    for layer in span_layers(model):
        layer.momentum = recipe.stats_momentum
    collect_statistics(model)


def build_optimizer(
    recipe: Recipe,
    module: nn.Module,
    *,
    capturable: bool = False,
    copies: Mapping[Tensor, Tensor] | None = None,
    process_group: dist.ProcessGroup | None = None,
    iteration_dtype: torch.dtype | None = None,
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the module's parameters; batch norm and biases are not adapted or decayed.

    With `capturable` its rates are tensors on the parameters' device, which a captured graph reads at every replay.
    `copies` are 16-bit tensors by parameter, to which it writes the weights as it moves them. Muon and Shampoo divide
    their work among `process_group`; `iteration_dtype` is Muon's.
    """
    groups = param_groups(
        module,
        weight_decay=recipe.weight_decay,
        decay_norm_and_bias=recipe.decay_norm_and_bias,
        separate_ends=recipe.optimizer == "muon",
    )
    if recipe.layer_decay < 1:
        groups = split_by_level(groups, levels(module), recipe.layer_decay)
    device = next(module.parameters()).device

    def rate(value: float) -> float | Tensor:
        return torch.tensor(value, device=device) if capturable else value

    for group in groups:
        group["weight_decay"] = rate(group["weight_decay"])
        group["lr"] = rate(peak_lr(recipe) * group.get("lr_factor", 1.0))
    common: dict[str, Any] = {"lr": peak_lr(recipe), "momentum": rate(recipe.momentum), "copies": copies}
    match recipe.optimizer:
        case "muon":
            sharing: dict[str, Any] = {"process_group": process_group, "iteration_dtype": iteration_dtype}
            return Muon(groups, capturable=capturable, **common, **sharing, **_muon_options(recipe))
        case "shampoo":
            return Shampoo(groups, process_group=process_group, **common, **_shampoo_options(recipe))
        case "lars":
            return LARS(groups, capturable=capturable, **common, **_lars_options(recipe))
        case "lamb":
            return LAMB(groups, capturable=capturable, **common, beta2=recipe.beta2)
        case "sgd":
            return SGD(groups, capturable=capturable, **common, **_momentum_options(recipe))
        case "rmsprop_warmup":
            return RMSpropWarmup(groups, capturable=capturable, **common, rmsprop_lr=recipe.rmsprop_lr)


def _momentum_options(recipe: Recipe) -> dict[str, Any]:
    return {"nesterov": recipe.nesterov, "momentum_form": recipe.momentum_form}


def _lars_options(recipe: Recipe) -> dict[str, Any]:
    return _momentum_options(recipe) | {
        "trust_coefficient": recipe.trust_coefficient,
        "eps": recipe.trust_eps,
        "denominator": recipe.trust_denominator,
        "trust_clip": recipe.trust_clip,
    }


def _muon_options(recipe: Recipe) -> dict[str, Any]:
    return {
        "nesterov": recipe.nesterov,
        "scale": recipe.muon_scale,
        "normalize_weights": recipe.normalize_weights,
        "sgd_lr_factor": recipe.sgd_lr_factor,
    }


def _shampoo_options(recipe: Recipe) -> dict[str, Any]:
    return _momentum_options(recipe) | {
        "beta2": recipe.beta2,
        "graft": recipe.graft,
        "root_every": recipe.root_every_steps,
        "trust_coefficient": recipe.trust_coefficient,
        "sgd_lr_factor": recipe.sgd_lr_factor,
    }
