"""What one training step must move, counted as it runs, by kinds of kernels whose names a profile shows.

    python benchmarks/gpu_traffic.py [--batch 32] [--pixels 224] [--fusion triton]

As a script it counts the launches and the bytes of a ResNet-50's forward and backward in 16 bit, one JSON line a kind
of kernel, on any machine with Triton: on tensors that hold no values, so nothing is computed. `--fusion plain` counts
torch's operations alone.

A launch moves each tensor that it is given once. torch's batch norm reads its inputs twice, for sums and for results.
Each operation of torch that computes is taken for one launch, and a convolution's backward for one per gradient.
"""

import argparse
import functools
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megabatch.kernels import dispatch
from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.fused.fuse import Fusion, set_fusion
from megabatch.nn.loss import cross_entropy_sum
from megabatch.nn.resnet import resnet50

CONVOLUTIONS = "torch's convolutions"
OTHERS = "other operations of torch"
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "device", "promote_types"}
READ_TWICE = {"native_batch_norm": 1, "native_batch_norm_backward": 2}
"""Operations that read their first arguments twice, and how many."""
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
    """While it is entered, notes what our kernels and torch's operations do."""

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = defaultdict(Work)
        self._patched: Any = None

    def __enter__(self) -> "Traffic":
        from triton.runtime.jit import JITFunction

        run = JITFunction.run

        def counted(kernel: Any, *args: Any, **options: Any) -> Any:
            self._add(kernel.__name__, args)
            return run(kernel, *args, **options)

        self._patched = patch.object(JITFunction, "run", counted)
        self._patched.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patched.stop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            self._add(CONVOLUTIONS, [*args[:2], out], _products(args[1], out))
        elif name == "convolution_backward":
            for wanted, others, result in zip(args[10], (args[2], args[1]), out, strict=False):
                if wanted:
                    self._add(CONVOLUTIONS, [args[0], others, result], _products(args[2], args[0]))
        elif _launches(func):
            self._add(OTHERS, [*args, *(kwargs or {}).values(), out])
            self.work[OTHERS].bytes += num_bytes(args[: READ_TWICE.get(name, 0)])
        return out

    def total(self) -> Work:
        """Of all kinds."""
        return Work(*(sum(getattr(work, what) for work in self.work.values()) for what in ("calls", "bytes", "flop")))

    def rows(self, count: int) -> Iterator[dict[str, Any]]:
        """Each kind with its launches and megabytes an image, and all together."""
        kinds = sorted(self.work.items(), key=lambda item: -item[1].bytes)
        for kind, work in (*kinds, ("all", self.total())):
            yield {"kind": kind, "launches": work.calls, "mb_per_image": round(work.bytes / count / 1e6, 2)}

    def _add(self, kind: str, values: Iterable[Any], flop: int = 0) -> None:
        work = self.work[kind]
        work.calls += 1
        work.bytes += num_bytes(values)
        work.flop += flop


def num_bytes(values: Iterable[Any]) -> int:
    """Bytes of the tensors among these values, and of those of descriptors; one that is given twice counts once."""
    tensors = [t for value in values if (t := getattr(value, "base", value)) is not None]
    sizes: dict[int, int] = {}
    for value in tensors:
        for t in value if isinstance(value, tuple | list) else [value]:
            if isinstance(t, Tensor):
                place = t.untyped_storage()._cdata
                sizes[place] = max(sizes.get(place, 0), t.numel() * t.element_size())
    return sum(sizes.values())


def _launches(func: Any) -> bool:
    is_view = any(made.alias_info is not None and not made.alias_info.is_write for made in func._schema.returns)
    return not is_view and func.overloadpacket.__name__ not in ALLOCATIONS


def count_step(count: int, pixels: int, fusion: Fusion) -> Traffic:
    """Of a ResNet-50 with one span, its weights in 16 bit; no kernel runs."""
    with redirected(lambda *_: None):
        step = fake_step(count, pixels, fusion=fusion)
        with Traffic() as traffic:
            step()
    return traffic


def fake_step(
    count: int, pixels: int, *, dtype: torch.dtype = torch.float16, fusion: Fusion = "triton"
) -> Callable[[], None]:
    """Forward and backward of a ResNet-50 on tensors without values; to be called within `redirected`."""
    norm: Any = nn.BatchNorm2d if fusion == "plain" else functools.partial(SpanBatchNorm2d, span=count)
    model = _half(resnet50(norm=norm), dtype)
    collect_statistics(model)
    set_fusion(model, fusion)
    images = torch.empty(count, 3, pixels, pixels, dtype=dtype).contiguous(memory_format=torch.channels_last)
    labels = torch.empty(count, dtype=torch.int64)
    return lambda: cross_entropy_sum(model(images), labels, label_smoothing=0.1, backend="triton").backward()


@contextmanager
def redirected(launch: Callable[[Any, tuple[Any, ...], dict[str, Any]], object]) -> Iterator[None]:
    """Tensors have no values, and a launch of a Triton kernel is `launch(kernel, arguments, options)` instead."""
    from triton.runtime.jit import JITFunction

    with (
        FakeTensorMode(),
        patch.object(JITFunction, "run", lambda kernel, *args, **options: launch(kernel, args, options)),
        patch.object(dispatch, "interprets", lambda: True),
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
    if re.fullmatch(r"[a-z_]+_kernel", name):
        return name
    return CONVOLUTIONS if _OF_CONVOLUTIONS.search(name) else OTHERS


def _products(weight: Tensor, y: Tensor) -> int:
    """Floating-point operations of a convolution with this weight and this output, or gradient of it."""
    return 2 * y.numel() * weight.numel() // weight.shape[0]


def main() -> None:
    """One line a kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="images (default 32)")
    parser.add_argument("--pixels", type=int, default=224, help="their height and width (default 224)")
    parser.add_argument("--fusion", choices=("plain", "triton"), default="triton")
    chosen = parser.parse_args()
    for row in count_step(chosen.batch, chosen.pixels, chosen.fusion).rows(chosen.batch):
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
