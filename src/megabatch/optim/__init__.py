"""Optimizers, schedules and batch-size control for large minibatches; each works in any PyTorch script.

Names are imported when first used, so that the schedules, which are plain arithmetic, never wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megabatch.optim.batch_size import NoiseScaleBatchPolicy, adjusted, batch_size_at
    from megabatch.optim.ema import WeightAverage
    from megabatch.optim.lamb import LAMB
    from megabatch.optim.lars import LARS
    from megabatch.optim.noise_scale import GradientNoiseScale
    from megabatch.optim.param_groups import param_groups
    from megabatch.optim.rmsprop_warmup import RMSpropWarmup
    from megabatch.optim.schedule import (
        lars_sqrt_peak_lr,
        learning_rate,
        resolution_at,
        scaled_peak_lr,
        sgd_share,
        weight_decay_at,
    )
    from megabatch.optim.sgd import SGD

_HOMES = {
    "GradientNoiseScale": "noise_scale",
    "LAMB": "lamb",
    "LARS": "lars",
    "NoiseScaleBatchPolicy": "batch_size",
    "RMSpropWarmup": "rmsprop_warmup",
    "SGD": "sgd",
    "WeightAverage": "ema",
    "adjusted": "batch_size",
    "batch_size_at": "batch_size",
    "lars_sqrt_peak_lr": "schedule",
    "learning_rate": "schedule",
    "param_groups": "param_groups",
    "resolution_at": "schedule",
    "scaled_peak_lr": "schedule",
    "sgd_share": "schedule",
    "weight_decay_at": "schedule",
}

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "GradientNoiseScale",
    "NoiseScaleBatchPolicy",
    "RMSpropWarmup",
    "WeightAverage",
    "adjusted",
    "batch_size_at",
    "lars_sqrt_peak_lr",
    "learning_rate",
    "param_groups",
    "resolution_at",
    "scaled_peak_lr",
    "sgd_share",
    "weight_decay_at",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value
