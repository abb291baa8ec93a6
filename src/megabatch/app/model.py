"""The recipe's model and optimizer."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megabatch.app.span_tiles import span_tiles
from megabatch.comm.launch import World
from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.fused.fuse import set_fusion
from megabatch.nn.initialize import initialize
from megabatch.nn.models import create_model
from megabatch.nn.resnet import Norm
from megabatch.optim.groups import param_groups
from megabatch.optim.lamb import LAMB
from megabatch.optim.lars import LARS
from megabatch.optim.muon import Muon
from megabatch.optim.rmsprop_warmup import RMSpropWarmup
from megabatch.optim.sgd import SGD
from megabatch.optim.shampoo import Shampoo
from megabatch.recipe import Recipe
from megabatch.runtime import Runtime
from megabatch.train.precision import widen_logits
from megabatch.train.schedule import peak_lr


def make_model(recipe: Recipe, norm: Norm = nn.BatchNorm2d) -> nn.Module:
    """The recipe's model with PyTorch's initialisation."""
    return create_model(
        recipe.model,
        num_classes=recipe.num_classes,
        in_channels=recipe.image_channels,
        norm=norm,
        zero_gamma=recipe.zero_gamma,
        blur_pool=recipe.blur_pool,
        width=recipe.width,
        image_size=int(max(value for _, value in recipe.resolution)),
        stem=recipe.stem,
    )


def memory_format(runtime: Runtime) -> torch.memory_format:
    """Layout of images and weights: channels_last unless the runtime says otherwise."""
    return torch.contiguous_format if runtime.channels_last is False else torch.channels_last


def unsafe_convolution(recipe: Recipe) -> str | None:
    """Describes a convolution that can corrupt memory in channels_last on a CPU, or returns None.

    PyTorch 2.13 with oneDNN, on a processor with AVX2 only, corrupts the heap in the float32 backward of a 1x1
    convolution with stride 2 and 2 to 5 input channels in channels_last. Fewer than 8 channels are avoided.
    """
    with torch.device("meta"):
        model = make_model(recipe)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and _is_unsafe(layer):
            return f"{name}, a 1x1 convolution of stride {layer.stride[0]} with {layer.in_channels} channels"
    return None


def _is_unsafe(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and max(layer.stride) > 1 and 1 < layer.in_channels // layer.groups < 8


def build_model(recipe: Recipe, runtime: Runtime, *, world: World, micro_batch_size: int) -> nn.Module:
    """The recipe's model, initialised alike on every worker from the seed alone."""
    groups = span_tiles(recipe, runtime, world=world, micro_batch_size=micro_batch_size)
    norm = functools.partial(
        SpanBatchNorm2d,
        span=recipe.bn_span,
        eps=recipe.bn_eps,
        stats_momentum=recipe.stats_momentum,
        process_group=groups.new_group(),
        group_size=groups.size,
    )
    model = make_model(recipe, norm)
    initialize(model, recipe.initialization, seed=recipe.seed, zero_gamma=recipe.zero_gamma)
    collect_statistics(model, True)
    set_fusion(model, runtime.fusion)
    widen_logits(model)
    return model.to(world.device, memory_format=memory_format(runtime))  # type: ignore[call-overload, no-any-return]


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
    device = next(module.parameters()).device

    def rate(value: float) -> float | Tensor:
        return torch.tensor(value, device=device) if capturable else value

    for group in groups:
        group["weight_decay"] = rate(group["weight_decay"])
    common: dict[str, Any] = {"lr": rate(peak_lr(recipe)), "momentum": rate(recipe.momentum), "copies": copies}
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
