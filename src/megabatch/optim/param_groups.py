"""Which tensors decay and which adapt: one rule, in one place."""

from typing import Any

from torch import Tensor, nn


def param_groups(model: nn.Module, *, weight_decay: float, decay_norm_and_bias: bool = False) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: `weights`, and `norm_and_bias`.

    Tensors of two or more dimensions decay and get a trust ratio. Scales, shifts and biases (one dimension or none)
    run plain momentum SGD at the same rate, without decay: their norms say nothing about a layer's step (You et al.
    2017, arXiv:1708.03888, adapts all; excluding them gains 0.7 points at 16k with PaddlePaddle's LARS, and TensorFlow
    and MLPerf exclude them). Frozen tensors are left out; a tensor shared by two modules comes once.

    Args:
        decay_norm_and_bias: scales, shifts and biases decay too; they still do not adapt.

    Returns:
        Groups with the keys params, param_names, name, weight_decay and adapt. An empty group is left out.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    weights = [(name, p) for name, p in named if p.ndim > 1]
    vectors = [(name, p) for name, p in named if p.ndim <= 1]
    groups = [
        _group("weights", weights, weight_decay=weight_decay, adapt=True),
        _group("norm_and_bias", vectors, weight_decay=weight_decay if decay_norm_and_bias else 0.0, adapt=False),
    ]
    return [group for group in groups if group["params"]]


def _group(name: str, named: list[tuple[str, nn.Parameter]], *, weight_decay: float, adapt: bool) -> dict[str, Any]:
    tensors: list[Tensor] = [p for _, p in named]
    names = [n for n, _ in named]
    return {"params": tensors, "param_names": names, "name": name, "weight_decay": weight_decay, "adapt": adapt}
