"""What one training step must move and multiply, counted as it runs, by kinds of kernels whose names a profile shows.

Each kernel's work is what its arguments say: every large tensor that it reads or writes, once. Operations of torch
other than convolutions are not counted: they are what a fused step should have none of.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megabatch.kernels import conv1x1, norm_passes
from megabatch.nn import fused_stem

CONVOLUTIONS = "torch's convolutions"
OTHERS = "other operations of torch"
PASSES: dict[tuple[ModuleType, str], str] = {
    (norm_passes, "moments"): "moments_kernel",
    (norm_passes, "normalise"): "normalise_kernel",
    (norm_passes, "gradient_sums"): "gradient_sums_kernel",
    (norm_passes, "input_gradient"): "input_gradient_kernel",
    (conv1x1, "conv1x1_forward"): "forward_kernel",
    (conv1x1, "conv1x1_data_gradient"): "data_gradient_kernel",
    (conv1x1, "conv1x1_weight_gradient"): "weight_gradient_kernel",
    (fused_stem, "fused_bn_relu_pool"): "pool_kernel",
}
"""Functions and the kernel that does their work."""
FLOP: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "forward_kernel": lambda args: 2 * args[0].numel() * len(args[1]),
    "data_gradient_kernel": lambda args: 2 * args[2].numel() * len(args[1]),
    "weight_gradient_kernel": lambda args: 2 * args[1].numel() * args[0].shape[1],
}
"""Floating-point operations by the positional arguments."""
OURS = (
    *PASSES.values(),
    "statistics_kernel",
    "collect_kernel",
    "averages_kernel",
    "add_parts_kernel",
    "cross_entropy_kernel",
    "norms_kernel",
    "update_kernel",
    "pool_gradient_sums_kernel",
    "pool_input_gradient_kernel",
)
_OF_CONVOLUTIONS = re.compile(r"cudnn|cutlass|xmma|cask|implicit|conv|wgrad|dgrad|gemm|nchwToNhwc|nhwcToNchw", re.I)


class Kernel(NamedTuple):
    """Of one step."""

    calls: int
    seconds: float


@dataclass
class Work:
    """Of one kind of kernel in one step."""

    calls: int = 0
    bytes: int = 0
    flop: int = 0


class Traffic(TorchDispatchMode):
    """While it is entered, notes what our passes and torch's convolutions do."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = defaultdict(Work)
        self._saved: list[tuple[ModuleType, str, Any]] = []
        self._inside = False

    def __enter__(self) -> "Traffic":
        for (module, name), kind in PASSES.items():
            function = getattr(module, name)
            self._saved.append((module, name, function))
            setattr(module, name, self._counted(function, kind))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for module, name, function in self._saved:
            setattr(module, name, function)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._inside and func is torch.ops.aten.convolution.default:
            self._add(CONVOLUTIONS, [*args[:2], out], _products(args[1], out))
        if not self._inside and func is torch.ops.aten.convolution_backward.default:
            for wanted, others, result in zip(args[10], (args[2], args[1]), out, strict=False):
                if wanted:
                    self._add(CONVOLUTIONS, [args[0], others, result], _products(args[2], args[0]))
        return out

    def total_bytes(self) -> int:
        """Of all kinds."""
        return sum(work.bytes for work in self.work.values())

    def _counted(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        """The function, noted as one call of `kind`; what it calls in its turn is not."""

        @functools.wraps(function)
        def counted(*args: Any, **options: Any) -> Any:
            outer, self._inside = self._inside, True
            out = function(*args, **options)
            self._inside = outer
            if not outer:
                self._note(kind, args, options, out)
            return out

        return counted

    def _note(self, kind: str, args: tuple[Any, ...], options: Mapping[str, Any], out: Any) -> None:
        given = list(_tensors([*args, *options.values()]))
        if kind == "pool_kernel":
            x, y = given[0], out[0]
            places = y.numel()  # one byte each
            self.work["moments_kernel"].calls += 1
            self.work["moments_kernel"].bytes += _size(x)
            self._add(kind, [x, y], 0, places)
            self._add("pool_gradient_sums_kernel", [x, y], 0, places)
            self._add("pool_input_gradient_kernel", [x, x, y], 0, places)
            return
        made = [] if kind == "gradient_sums_kernel" and options.get("output") is None else list(_tensors([out]))
        self._add(kind, [*given, *made], FLOP[kind](args) if kind in FLOP else 0)

    def _add(self, kind: str, tensors: Iterable[Tensor], flop: int, more_bytes: int = 0) -> None:
        work = self.work[kind]
        work.calls += 1
        work.bytes += sum(map(_size, tensors)) + more_bytes
        work.flop += flop


def by_kind(kernels: Mapping[str, Kernel]) -> dict[str, Kernel]:
    """A profile's kernels put together: each of ours for itself, torch's convolutions, and the rest."""
    kinds: dict[str, Kernel] = {}
    for name, kernel in kernels.items():
        kind = kind_of(name)
        before = kinds.get(kind, Kernel(0, 0.0))
        kinds[kind] = Kernel(before.calls + kernel.calls, before.seconds + kernel.seconds)
    return kinds


def kind_of(name: str) -> str:
    """Of a kernel as the profiler names it."""
    if name in OURS:
        return name
    return CONVOLUTIONS if _OF_CONVOLUTIONS.search(name) else OTHERS


def _products(weight: Tensor, y: Tensor) -> int:
    """Floating-point operations of a convolution with this weight and this output, or gradient of it."""
    return 2 * y.numel() * weight.numel() // weight.shape[0]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
