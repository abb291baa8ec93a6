"""Kernels, each beside its plain-PyTorch reference and behind one function; each works in any PyTorch script.

That function runs the Triton kernel on a GPU where Triton is installed, compiled C on a CPU where there is some (batch
norm with residual and ReLU, convolutions), and the reference elsewhere. Names are imported when first used, and Triton
not before a kernel runs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megabatch.kernels.batch_norm import batch_norm_act_reference, fused_bn_act
    from megabatch.kernels.conv1x1 import conv1x1_data_gradient, conv1x1_forward, conv1x1_weight_gradient
    from megabatch.kernels.crop_resize import crop_and_resize
    from megabatch.kernels.dispatch import Backend, has_triton
    from megabatch.kernels.lamb import LambGroup, lamb_step, lamb_step_reference
    from megabatch.kernels.lars import LarsGroup, lars_step, lars_step_reference
    from megabatch.kernels.loss import cross_entropy_with_gradient, fused_cross_entropy_sum
    from megabatch.kernels.norm_passes import Moments, Normalisation
    from megabatch.kernels.optimizer_tables import StepTables
    from megabatch.kernels.residual import join_conv1x1, norm_conv1x1
    from megabatch.kernels.rmsprop import RmspropGroup, rmsprop_step, rmsprop_step_reference
    from megabatch.kernels.stem import fused_bn_relu_pool
    from megabatch.kernels.tiles import Tiling
    from megabatch.kernels.tuning import Table, use_table

_HOMES = {
    "Backend": "dispatch",
    "LambGroup": "lamb",
    "LarsGroup": "lars",
    "Moments": "norm_passes",
    "Normalisation": "norm_passes",
    "RmspropGroup": "rmsprop",
    "StepTables": "optimizer_tables",
    "Table": "tuning",
    "Tiling": "tiles",
    "batch_norm_act_reference": "batch_norm",
    "conv1x1_data_gradient": "conv1x1",
    "conv1x1_forward": "conv1x1",
    "conv1x1_weight_gradient": "conv1x1",
    "crop_and_resize": "crop_resize",
    "cross_entropy_with_gradient": "loss",
    "fused_bn_act": "batch_norm",
    "fused_bn_relu_pool": "stem",
    "fused_cross_entropy_sum": "loss",
    "has_triton": "dispatch",
    "join_conv1x1": "residual",
    "lamb_step": "lamb",
    "lamb_step_reference": "lamb",
    "lars_step": "lars",
    "lars_step_reference": "lars",
    "norm_conv1x1": "residual",
    "rmsprop_step": "rmsprop",
    "rmsprop_step_reference": "rmsprop",
    "use_table": "tuning",
}

__all__ = [
    "Backend",
    "LambGroup",
    "LarsGroup",
    "Moments",
    "Normalisation",
    "RmspropGroup",
    "StepTables",
    "Table",
    "Tiling",
    "batch_norm_act_reference",
    "conv1x1_data_gradient",
    "conv1x1_forward",
    "conv1x1_weight_gradient",
    "crop_and_resize",
    "cross_entropy_with_gradient",
    "fused_bn_act",
    "fused_bn_relu_pool",
    "fused_cross_entropy_sum",
    "has_triton",
    "join_conv1x1",
    "lamb_step",
    "lamb_step_reference",
    "lars_step",
    "lars_step_reference",
    "norm_conv1x1",
    "rmsprop_step",
    "rmsprop_step_reference",
    "use_table",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
