"""Train image classifiers to full accuracy with extremely large minibatches.

The names below are the public Python API; `docs/reference.md` shows each. They are imported on first use, so
`import megabatch` needs neither torch nor time. Everything else in the package is internal and may change.
"""

import sys

if sys.argv[:1] == ["-m"] and "-m megabatch" in " ".join(sys.orig_argv) and not sys.flags.safe_path:
    sys.path.pop(0)  # `python -m megabatch` puts the current folder there, whose files would shadow modules

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megabatch.app.load import load_model as load_model
    from megabatch.comm.exchange.grid import make_grid as make_grid
    from megabatch.comm.exchange.hooks import torus_hook as torus_hook
    from megabatch.comm.exchange.state import ExchangeState as ExchangeState
    from megabatch.comm.exchange.wrap import wrap as wrap
    from megabatch.data.loading.eval_loader import EvalLoader as EvalLoader
    from megabatch.data.loading.train_loader import TrainLoader as TrainLoader
    from megabatch.data.sources.arrays import ArraySource as ArraySource
    from megabatch.data.sources.dataset import open_folder as open_folder
    from megabatch.data.sources.dataset import open_parquet as open_parquet
    from megabatch.data.sources.dataset import open_shards as open_shards
    from megabatch.errors import MegabatchError as MegabatchError
    from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics as collect_statistics
    from megabatch.nn.batch_norm.evaluation_statistics import finish_step as finish_step
    from megabatch.nn.batch_norm.layer import SpanBatchNorm2d as SpanBatchNorm2d
    from megabatch.nn.batch_norm.layer import convert as convert
    from megabatch.nn.fused.fuse import set_fusion as set_fusion
    from megabatch.nn.loss import cross_entropy_sum as cross_entropy_sum
    from megabatch.nn.models import create_model as create_model
    from megabatch.nn.vgg import whiten_ as whiten_
    from megabatch.optim.batch_size import NoiseScaleBatchPolicy as NoiseScaleBatchPolicy
    from megabatch.optim.ema import WeightAverage as WeightAverage
    from megabatch.optim.groups import param_groups as param_groups
    from megabatch.optim.lamb import LAMB as LAMB
    from megabatch.optim.lars import LARS as LARS
    from megabatch.optim.muon import Muon as Muon
    from megabatch.optim.noise_scale import GradientNoiseScale as GradientNoiseScale
    from megabatch.optim.rmsprop_warmup import RMSpropWarmup as RMSpropWarmup
    from megabatch.optim.schedule import learning_rate as learning_rate
    from megabatch.optim.sgd import SGD as SGD
    from megabatch.optim.shampoo import Shampoo as Shampoo
    from megabatch.recipe import Recipe as Recipe
    from megabatch.train.cuda_graph import CapturedStep as CapturedStep

__version__ = "0.1.0"

_NAMES = {
    "app.load": ["load_model"],
    "comm.exchange.grid": ["make_grid"],
    "comm.exchange.hooks": ["torus_hook"],
    "comm.exchange.state": ["ExchangeState"],
    "comm.exchange.wrap": ["wrap"],
    "data.loading.eval_loader": ["EvalLoader"],
    "data.loading.train_loader": ["TrainLoader"],
    "data.sources.arrays": ["ArraySource"],
    "data.sources.dataset": ["open_folder", "open_parquet", "open_shards"],
    "errors": ["MegabatchError"],
    "nn.batch_norm.evaluation_statistics": ["collect_statistics", "finish_step"],
    "nn.batch_norm.layer": ["SpanBatchNorm2d", "convert"],
    "nn.fused.fuse": ["set_fusion"],
    "nn.loss": ["cross_entropy_sum"],
    "nn.models": ["create_model"],
    "nn.vgg": ["whiten_"],
    "optim.batch_size": ["NoiseScaleBatchPolicy"],
    "optim.ema": ["WeightAverage"],
    "optim.lamb": ["LAMB"],
    "optim.lars": ["LARS"],
    "optim.muon": ["Muon"],
    "optim.noise_scale": ["GradientNoiseScale"],
    "optim.groups": ["param_groups"],
    "optim.rmsprop_warmup": ["RMSpropWarmup"],
    "optim.schedule": ["learning_rate"],
    "optim.sgd": ["SGD"],
    "optim.shampoo": ["Shampoo"],
    "recipe": ["Recipe"],
    "train.cuda_graph": ["CapturedStep"],
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - the names of the table


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megabatch' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"megabatch.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def _names_of(package: str) -> Callable[[str], Any]:
    """A package's `__getattr__` that finds those public names whose home is in it."""

    def find(name: str) -> Any:
        if f"megabatch.{_HOMES.get(name)}".startswith(f"{package}."):
            return __getattr__(name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
