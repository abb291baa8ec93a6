"""Time of one optimizer step on ResNet-50's 161 tensors: megabatch's backends, timm, pytorch_optimizer and torch.

    python benchmarks/optimizer.py --output benchmarks/out [--repeats 30] [--threads N] [--device cpu|cuda]

Only `step()` is timed, with gradients computed beforehand. All cases run interleaved in one process; each has its own
weights, gradients and state (25.6 million fp32 values each). Ratios are relative to `megabatch LARS`. timm and
pytorch_optimizer are skipped if they are not installed.

On a GPU every step is a replay of a CUDA graph, so that device time is measured without Python's overhead; a case that
cannot be captured is timed without a graph and named accordingly. There `megabatch LARS`, `SGD`, `LAMB` and
`RMSpropWarmup` use the kernels, and their lines give the bytes that a step must move and the bytes per second reached.
"""

import argparse
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpu_session import graph_of
from megabatch.bench.timing import Timing, Work, compare, record, table, write_lines
from megabatch.errors import UserError
from megabatch.optim.lamb import LAMB
from megabatch.optim.lars import LARS
from megabatch.optim.rmsprop_warmup import RMSpropWarmup
from megabatch.optim.sgd import SGD

Group = dict[str, Any]
BASELINE = "megabatch LARS"
PACKAGES = ("timm", "pytorch-optimizer")
DECAY = 5e-5
FUSED = "megabatch {}, fused"
COPIES = "megabatch LARS, fused, with 16-bit copies"
BYTES_PER_VALUE = {BASELINE: 28, COPIES: 30, FUSED.format("SGD"): 20, FUSED.format("LAMB"): 40}
BYTES_PER_VALUE |= {FUSED.format("RMSpropWarmup"): 28}
"""Bytes that a step must move for each fp32 parameter; see the modules of `megabatch.optim.kernels`."""

Maker = Callable[[list[Group]], torch.optim.Optimizer]


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Shapes of ResNet-50's 161 parameters (He et al. 2015, arXiv:1512.03385): 53 convolutions, 53 norms, one layer."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, num_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(num_blocks):
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, channels, 1, 1))
            for shape in convolutions:
                shapes += [shape, (shape[0],), (shape[0],)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def tensors(device: str) -> list[tuple[Tensor, Tensor]]:
    """Pairs of weight and gradient; filters in channels_last."""
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, *shape, generator=generator).unbind() for shape in resnet50_shapes()]
    return [
        tuple(_in_usual_layout((scale * t).to(device)) for scale, t in zip((0.05, 1e-3), p, strict=True)) for p in pairs
    ]


def groups(pairs: list[tuple[Tensor, Tensor]]) -> list[Group]:
    """New parameters with gradients, in the usual two groups: 54 decay and adapt, 107 do neither."""
    parameters = [nn.Parameter(weight.clone()) for weight, _ in pairs]
    for p, (_, gradient) in zip(parameters, pairs, strict=True):
        p.grad = gradient.clone()
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY, "adapt": True},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "adapt": False},
    ]


def cases(device: str) -> Iterator[tuple[str, Maker]]:
    """Name and constructor of each optimizer that is installed."""
    yield from _ours_on_a_gpu(device) if device == "cuda" else _ours_on_a_cpu()
    for path in ("foreach", "fused"):
        yield f"torch SGD {path}=True", lambda g, path=path: torch.optim.SGD(g, lr=1e-4, momentum=0.9, **{path: True})
    if (timm_lars := _timm_optim("lars")) is not None:
        yield "timm Lars", lambda g: timm_lars.Lars(g, lr=0.01, momentum=0.9)
        yield "timm Lars foreach=True", lambda g: timm_lars.Lars(g, lr=0.01, momentum=0.9, foreach=True)
        yield "timm Lars foreach=False", lambda g: timm_lars.Lars(g, lr=0.01, momentum=0.9, foreach=False)
        timm_lamb = _timm_optim("lamb")
        yield "timm Lamb", lambda g: timm_lamb.Lamb(g, lr=1e-4, max_grad_norm=None)
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        package = importlib.import_module("pytorch_optimizer")
        yield "pytorch_optimizer LARS", lambda g: package.LARS(g, lr=0.01)
        yield "pytorch_optimizer LARS foreach=True", lambda g: package.LARS(g, lr=0.01, foreach=True)
        yield "pytorch_optimizer LARS foreach=False", lambda g: package.LARS(g, lr=0.01, foreach=False)


def _ours_on_a_cpu() -> Iterator[tuple[str, Maker]]:
    yield BASELINE, lambda g: LARS(g, lr=0.01)
    yield "megabatch LARS foreach=True", lambda g: LARS(g, lr=0.01, foreach=True)
    yield "megabatch LARS foreach=False", lambda g: LARS(g, lr=0.01, foreach=False)
    yield "megabatch LARS inside_corrected", lambda g: LARS(g, lr=0.01, momentum_form="inside_corrected")
    yield "megabatch SGD", lambda g: SGD(g, lr=1e-4)
    yield "megabatch LAMB", lambda g: LAMB(g, lr=1e-4)


def _ours_on_a_gpu(device: str) -> Iterator[tuple[str, Maker]]:
    """Capturable optimizers with a tensor rate; `LARS` uses its kernel by default."""

    def rate(value: float) -> dict[str, Any]:
        return {"lr": torch.tensor(value, device=device), "capturable": True}

    yield BASELINE, lambda g: LARS(g, **rate(0.01))
    yield COPIES, lambda g: LARS(g, **rate(0.01), fused=True, copies={p: p.detach().bfloat16() for p in _parameters(g)})
    yield "megabatch LARS foreach=True", lambda g: LARS(g, **rate(0.01), foreach=True)
    yield FUSED.format("SGD"), lambda g: SGD(g, **rate(1e-4), fused=True)
    yield FUSED.format("LAMB"), lambda g: LAMB(g, **rate(1e-4), fused=True)
    yield "megabatch LAMB foreach=True", lambda g: LAMB(g, **rate(1e-4), foreach=True)
    yield FUSED.format("RMSpropWarmup"), lambda g: RMSpropWarmup(g, **rate(1e-4), fused=True)


def _parameters(groups: list[Group]) -> list[Tensor]:
    return [p for group in groups for p in group["params"]]


def works(device: str) -> dict[str, Work]:
    """Function that takes one step, for each case; on a GPU a replay of a captured step."""
    pairs = tensors(device)
    found: dict[str, Work] = {}
    for name, make in cases(device):
        step = make(groups(pairs)).step
        if device == "cpu":
            found[name] = step
            continue
        try:
            found[name] = graph_of(step)
        except (RuntimeError, UserError) as error:  # it copies a value to the host or does not support capture
            torch.cuda.synchronize()
            print(f"{name} cannot be captured: {str(error).splitlines()[0]}", file=sys.stderr)
            found[f"{name}, not captured"] = make(groups(pairs)).step
    return found


def main() -> None:
    """Measures, prints a table and writes `optimizer.jsonl`."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    timings = compare(works(options.device), warmup=options.warmup, repeats=options.repeats)
    count = sum(torch.Size(shape).numel() for shape in resnet50_shapes())
    parameters = {"tensors": len(resnet50_shapes()), "dtype": "float32", "device": options.device}
    records = [
        record(
            "optimizer step",
            name,
            timing,
            parameters=parameters | _bytes(name, options.device, count, timing),
            baseline=(BASELINE, timings[BASELINE]),
            packages=PACKAGES,
        )
        for name, timing in timings.items()
    ]
    write_lines(options.output / "optimizer.jsonl", records)
    print(table(records))


def _bytes(name: str, device: str, count: int, timing: Timing) -> dict[str, float]:
    if device == "cpu" or name not in BYTES_PER_VALUE:
        return {}
    moved = BYTES_PER_VALUE[name] * count
    return {"bytes": moved, "bytes_per_s": moved / timing.median_s}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for optimizer.jsonl")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="torch's intra-op threads; 0: torch's own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


def _in_usual_layout(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last if tensor.ndim == 4 else torch.contiguous_format)


def _timm_optim(name: str) -> Any:
    """A module of timm.optim. timm's `__init__` is not run, since it imports torchvision, which fails on CPU builds."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return None
    package = types.ModuleType("timm_optim_alone")
    package.__path__ = [str(Path(spec.submodule_search_locations[0]) / "optim")]
    sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"{package.__name__}.{name}")


if __name__ == "__main__":
    main()
