"""Gradient exchange: all-reduce algorithms on a grid of ranks, as DDP hooks. Names load on first use, so that the
cost model can be had without torch."""

from importlib import import_module
from typing import Any

_HOME = {
    "ALGORITHMS": "algorithms",
    "ExchangeState": "exchange",
    "Grid": "grid",
    "PeerMonitor": "peers",
    "Timeline": "timeline",
    "all_reduce": "algorithms",
    "flat_hook": "hooks",
    "hierarchical_hook": "hooks",
    "leave": "launch",
    "make_grid": "grid",
    "split_torus_hook": "hooks",
    "torus_hook": "hooks",
    "wrap": "buckets",
}
__all__ = sorted(_HOME)  # noqa: PLE0605 - the names are those of the table


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
