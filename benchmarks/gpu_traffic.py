"""What one training step must move and multiply, counted as it runs, by kinds of kernels whose names a profile shows.

    python benchmarks/gpu_traffic.py [--batch 32] [--pixels 224] [--kernels]

As a script it counts the launches and the bytes of a fused ResNet-50's forward and backward in 16 bit, one JSON line a
kind of kernel, on any machine with Triton: on tensors that hold no values, so nothing is computed. `--kernels`: with
kernels of ours for 1x1 convolutions wherever they fit, which also apply batch norm's backward as they read; else with
torch's convolutions between our passes.

Each kernel's bytes are what its arguments say: every large tensor that it reads or writes, once. Those of torch's
operations other than convolutions are not counted: they are what a fused step should have none of. Each operation of
torch that computes is taken for one launch, and a convolution's backward for one a gradient.
"""

import argparse
import functools
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megabatch.kernels import dispatch, tuning
from megabatch.kernels.bottleneck import conv1x1, products, residual, tiles
from megabatch.kernels.norm import join as join_passes
from megabatch.kernels.norm import passes as norm_passes
from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.fused import stem as fused_stem
from megabatch.nn.fused.fuse import set_fusion
from megabatch.nn.loss import cross_entropy_sum
from megabatch.nn.resnet import resnet50

CONVOLUTIONS = "torch's convolutions"
OTHERS = "other operations of torch"
PASSES: dict[tuple[ModuleType, str], str] = {
    (norm_passes, "moments"): "moments_kernel",
    (norm_passes, "normalise"): "normalise_kernel",
    (norm_passes, "gradient_sums"): "gradient_sums_kernel",
    (norm_passes, "input_gradient"): "input_gradient_kernel",
    (join_passes, "join"): "join_kernel",
    (join_passes, "join_gradient"): "join_gradient_kernel",
    (join_passes, "two_input_gradients"): "two_input_gradients_kernel",
    (conv1x1, "conv1x1_forward"): "forward_kernel",
    (conv1x1, "conv1x1_data_gradient"): "data_gradient_kernel",
    (conv1x1, "conv1x1_weight_gradient"): "weight_gradient_kernel",
    (fused_stem, "fused_bn_relu_pool"): "pool_kernel",
}
"""Functions and the kernel that does their work."""
LIBRARY = {**dict.fromkeys((*residual.TASKS, *residual.GRADIENTS), tuning.PLAIN), fused_stem.TASK: "4"}
"""Fixed choices of `tuning.Table`: torch's convolutions between our passes, four channels of the stem's images."""
FLOP: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "forward_kernel": lambda args: 2 * args[0].numel() * len(args[1]),
    "data_gradient_kernel": lambda args: 2 * args[2].numel() * len(args[1]),
    "weight_gradient_kernel": lambda args: 2 * args[1].numel() * args[0].shape[1],
}
"""Floating-point operations by the positional arguments."""
RESIDENT_PROGRAMS = 264
"""Two on each of the 132 multiprocessors of an H200."""
OURS = (
    *PASSES.values(),
    "statistics_kernel",
    "keep_kernel",
    "add_parts_kernel",
    "cross_entropy_kernel",
    "norms_kernel",
    "update_kernel",
    "pool_gradient_sums_kernel",
    "pool_input_gradient_kernel",
)
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "device"}
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
        self.operations: Counter[str] = Counter()
        self._saved: list[tuple[ModuleType, str, Any]] = []
        self._inside = False

    def __enter__(self) -> "Traffic":
        for (module, name), kind in PASSES.items():
            function = getattr(module, name)
            counted = self._counted(function, kind)
            for place, attribute in list(_places(function)):
                self._saved.append((place, attribute, function))
                setattr(place, attribute, counted)
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
        if num_launches(func, args):
            self.operations[func.overloadpacket.__name__] += num_launches(func, args)
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
        self._add(kind, [*given, *_tensors([out])], FLOP[kind](args) if kind in FLOP else 0)

    def _add(self, kind: str, tensors: Iterable[Tensor], flop: int, more_bytes: int = 0) -> None:
        work = self.work[kind]
        work.calls += 1
        work.bytes += sum(map(_size, tensors)) + more_bytes
        work.flop += flop


def _places(function: Any) -> Iterator[tuple[ModuleType, str]]:
    """Modules of megabatch that hold the function, and under which name: some import it by name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megabatch."):
            yield from ((module, attribute) for attribute, value in vars(module).items() if value is function)


def num_launches(func: Any, args: tuple[Any, ...]) -> int:
    """Kernels that an operation of torch is taken for."""
    if func is torch.ops.aten.convolution_backward.default:
        return sum(args[10])
    is_view = any(made.alias_info is not None and not made.alias_info.is_write for made in func._schema.returns)
    return 0 if is_view or func.overloadpacket.__name__ in ALLOCATIONS else 1


class Step(NamedTuple):
    """Of one forward and backward."""

    launches: Counter[str]
    work: Mapping[str, Work]

    def rows(self, count: int) -> Iterator[dict[str, Any]]:
        """Each kind with its launches and megabytes an image, and all together."""
        for kind in sorted(self.launches.keys() | self.work.keys(), key=lambda kind: -self.launches[kind]):
            moved = self.work[kind].bytes if kind in self.work else 0
            yield {"kind": kind, "launches": self.launches[kind], "mb_per_image": round(moved / count / 1e6, 2)}
        moved = sum(work.bytes for work in self.work.values())
        yield {"kind": "all", "launches": self.launches.total(), "mb_per_image": round(moved / count / 1e6, 1)}


def count_step(count: int, pixels: int, *, kernels: bool) -> Step:
    """Of a fused ResNet-50 with one span, its weights in 16 bit; no kernel runs."""
    launches: Counter[str] = Counter()
    tuning.use_table(tuning.Table(fixed=kernel_choices() if kernels else LIBRARY))
    with redirected(lambda kernel, *_: launches.update([kernel.__name__])), Traffic() as traffic:
        step = fake_step(count, pixels)
        launches.clear()
        traffic.operations.clear()
        step()
    tuning.use_table(None)
    missed = [kind for kind in PASSES.values() if traffic.work[kind].calls != launches[kind]]
    if missed:
        raise RuntimeError(
            f"launches of {', '.join(missed)} whose bytes are not counted; list their function in PASSES"
        )
    for name, number in traffic.operations.items():
        launches[CONVOLUTIONS if name.startswith("convolution") else OTHERS] += number
    return Step(launches, traffic.work)


def fake_step(count: int, pixels: int, *, dtype: torch.dtype = torch.float16, gram: bool = False) -> Callable[[], None]:
    """Forward and backward of a fused ResNet-50 on tensors without values; to be called within `redirected`."""
    model = _half(resnet50(norm=functools.partial(SpanBatchNorm2d, span=count)), dtype)
    collect_statistics(model)
    set_fusion(model, "gram" if gram else "triton")
    for part in model.modules():
        if hasattr(part, "backend"):
            part.backend = "triton"
    images = torch.empty(count, 3, pixels, pixels, dtype=dtype).contiguous(memory_format=torch.channels_last)
    labels = torch.empty(count, dtype=torch.int64)
    return lambda: cross_entropy_sum(model(images), labels, label_smoothing=0.1, backend="triton").backward()


def kernel_choices() -> dict[str, str]:
    """As `LIBRARY`, with our kernels for 1x1 convolutions, which apply batch norm's backward as they read."""
    fixed = {task: tilings[0].name() for task, tilings in _tilings().items()}
    return {**LIBRARY, **fixed, **dict.fromkeys(residual.GRADIENTS, products.TOGETHER)}


def _tilings() -> dict[str, tuple[conv1x1.Tiling, ...]]:
    kinds = {
        "forward": conv1x1.FORWARD_TILINGS,
        "data": conv1x1.DATA_GRADIENT_TILINGS,
        "weight": conv1x1.WEIGHT_GRADIENT_TILINGS,
    }
    return {task: kinds[task.split()[1]] for task in residual.TASKS}


@contextmanager
def redirected(launch: Callable[[Any, tuple[Any, ...], dict[str, Any]], object]) -> Iterator[None]:
    """Tensors have no values, and a launch of a Triton kernel is `launch(kernel, arguments, options)` instead."""
    from triton.runtime.jit import JITFunction

    with (
        FakeTensorMode(),
        patch.object(JITFunction, "run", lambda kernel, *args, **options: launch(kernel, args, options)),
        patch.object(dispatch, "interprets", lambda: True),
        patch.object(tiles, "_resident_programs", lambda _: RESIDENT_PROGRAMS),
    ):
        yield


def _half(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """With convolutions and the last layer in 16 bit, filters with the channels last."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            for name, parameter in list(layer.named_parameters(recurse=False)):
                layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
                small = parameter.detach().to(dtype).contiguous(memory_format=layout)
                layer.register_parameter(name, nn.Parameter(small))
    return model


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


def main() -> None:
    """One line a kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="images (default 32)")
    parser.add_argument("--pixels", type=int, default=224, help="their height and width (default 224)")
    parser.add_argument("--kernels", action="store_true", help="our kernels for 1x1 convolutions wherever they fit")
    chosen = parser.parse_args()
    for row in count_step(chosen.batch, chosen.pixels, kernels=chosen.kernels).rows(chosen.batch):
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
