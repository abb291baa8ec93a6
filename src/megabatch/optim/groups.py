"""Parameter groups: which parameters decay and adapt."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from megabatch.optim.engine.shards import refuse_flattened

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Normalisation layers. `_NormBase` is the base of all batch norms (also SyncBatchNorm and ours) and instance norms."""


def param_groups(
    model: nn.Module, *, weight_decay: float, decay_norm_and_bias: bool = False, separate_ends: bool = False
) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: `weights`, which decay and adapt, and `norm_and_bias`, which do neither.

    A parameter belongs to `norm_and_bias` if it is one of these, and to `weights` otherwise:

    - a parameter of a normalisation layer: batch, layer, group, instance or RMS norm, or a subclass of one;
    - a bias: "bias" is a word of its name, as in `bias`, `in_proj_bias`, `bias_k` or `relative_position_bias_table`;
    - of one or no dimension, such as the scale of a LayerScale or a learnt temperature.

    `norm_and_bias` runs plain momentum SGD at the same learning rate: the norm of such a tensor says little about the
    step its layer needs. (You et al. 2017, arXiv:1708.03888, adapt all tensors; excluding these gains 0.7 points at a
    batch of 16k with PaddlePaddle's LARS, and TensorFlow and MLPerf exclude them.) Frozen parameters are left out. A
    tied parameter is listed once, in `norm_and_bias` if any of its uses is a norm or a bias.

        optimizer = LARS(param_groups(model, weight_decay=1e-4), lr=0.0)

    Args:
        weight_decay: coefficient of the group `weights`.
        decay_norm_and_bias: apply `weight_decay` to `norm_and_bias` too; these parameters still do not adapt.
        separate_ends: move the first and the last of the weights, in the order of `model.named_parameters()`, to a
            group `ends`, which decays and does not adapt, as `Muon` needs it. A frozen first layer stays the first.

    Returns:
        Groups with the keys params, param_names, name, weight_decay and adapt. An empty group is left out.

    Raises:
        UserError: parameters that FullyShardedDataParallel has flattened; `fully_shard` keeps their shapes.
    """
    refuse_flattened(list(model.parameters()))
    excluded = {id(parameter) for parameter in _norms_and_biases(model)}
    named = list(model.named_parameters())
    weights = [(name, p) for name, p in named if p.ndim > 1 and id(p) not in excluded]
    others = [(name, p) for name, p in named if p.ndim <= 1 or id(p) in excluded]
    ends = [*weights[:1], *weights[1:][-1:]] if separate_ends else []
    hidden = weights[1:-1] if separate_ends else weights
    groups = [
        _group("weights", hidden, weight_decay=weight_decay, adapt=True),
        _group("ends", ends, weight_decay=weight_decay, adapt=False),
        _group("norm_and_bias", others, weight_decay=weight_decay if decay_norm_and_bias else 0.0, adapt=False),
    ]
    return [group for group in groups if group["params"]]


def split_by_level(
    groups: Sequence[dict[str, Any]], levels: Mapping[str, int], layer_decay: float
) -> list[dict[str, Any]]:
    """Divides `groups` by the `levels` of their parameters, by name, and gives each part an `lr_factor`.

        lr_factor = layer_decay^(highest level - level)        Clark et al. 2020, arXiv:2003.10555, appendix A

    The training loop multiplies a group's learning rate by it.
    """
    highest, parts = max(levels.values()), list[dict[str, Any]]()
    for group in groups:
        named = list(zip(group["param_names"], group["params"], strict=True))
        for level in sorted({levels[name] for name, _ in named}):
            chosen = [(name, p) for name, p in named if levels[name] == level]
            part = {"params": [p for _, p in chosen], "param_names": [name for name, _ in chosen]}
            parts.append(group | part | {"lr_factor": layer_decay ** (highest - level)})
    return parts


def _norms_and_biases(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of normalisation layers, and those that any module holds under the name of a bias."""
    for module in model.modules():
        if isinstance(module, NORMS):
            yield from module.parameters()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if "bias" in name.rpartition(".")[2].split("_"):
            yield parameter


def _group(name: str, named: list[tuple[str, nn.Parameter]], *, weight_decay: float, adapt: bool) -> dict[str, Any]:
    tensors: list[Tensor] = [p for _, p in named if p.requires_grad]
    names = [n for n, p in named if p.requires_grad]
    return {"params": tensors, "param_names": names, "name": name, "weight_decay": weight_decay, "adapt": adapt}
