"""Time of a span layer relative to nn.BatchNorm2d, forward and backward, on the shapes of ResNet-50 and resnet8.

    python benchmarks/batch_norm.py --output benchmarks/out [--repeats 15] [--device cpu|cuda]

One thread. For each shape, layout and dtype, interleaved in one process: nn.BatchNorm2d (the baseline), a span layer
whose span is the batch (updating running averages itself, and collecting statistics for `finish_step`), and a span
layer with four spans per batch. Then resnet8 forward and backward with each of them. "sum" lines add the medians of a
net's shapes, each as often as it occurs.
"""

import argparse
import functools
import random
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import megabatch.bench.timing as harness
from megabatch.bench.timing import Timing, Work, record, table, write_lines
from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.resnet import Norm
from megabatch.nn.small import resnet8

BASELINE = "nn.BatchNorm2d"
AIM = 1.1  # target for span = batch, time relative to the baseline
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# (batch, channels, height, width), and the number of the net's batch norms of that shape
RESNET50 = {
    (32, 64, 56, 56): 6,
    (32, 256, 56, 56): 4,
    (32, 128, 28, 28): 7,
    (32, 512, 28, 28): 5,
    (32, 256, 14, 14): 11,
    (32, 1024, 14, 14): 7,
    (32, 512, 7, 7): 5,
    (32, 2048, 7, 7): 4,
}
RESNET8 = {(128, 16, 14, 14): 3, (128, 32, 7, 7): 3, (128, 64, 4, 4): 3}
NETS = {"resnet50": RESNET50, "resnet8": RESNET8}


def layers(batch: int) -> dict[str, Norm]:
    """Constructors of the layers to compare, by name."""
    return {
        BASELINE: nn.BatchNorm2d,
        "span = batch": functools.partial(SpanBatchNorm2d, span=batch),
        "span = batch, collecting": functools.partial(SpanBatchNorm2d, span=batch),
        "four spans, collecting": functools.partial(SpanBatchNorm2d, span=batch // 4),
    }


def layer_work(name: str, make: Norm, x: Tensor, slope: Tensor) -> Work:
    """Forward and backward of one layer."""
    layer = make(x.shape[1]).to(x.device)
    collect_statistics(layer, name.endswith("collecting"))
    leaf = x.clone().requires_grad_()
    wanted = [leaf, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(leaf), wanted, slope)


def net_work(name: str, make: Norm, x: Tensor, dtype: torch.dtype) -> Work:
    """Forward and backward of resnet8."""
    model = resnet8(in_channels=x.shape[1], norm=make).to(x.device)
    collect_statistics(model, name.endswith("collecting"))
    wanted = list(model.parameters())

    def work() -> None:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            logits = model(x)
        torch.autograd.grad(logits.float().square().sum(), wanted)

    return work


def compare(works: dict[str, Work], *, repeats: int) -> dict[str, Timing]:
    """Interleaved timings: on a CPU the thread's CPU time, which other processes do not add to; on a GPU elapsed."""
    if torch.cuda.is_available():
        return harness.compare(works, warmup=3, repeats=repeats)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    order = random.Random(0)
    for number in range(-3, repeats):
        for name in order.sample(list(works), len(works)):
            start = time.thread_time()
            works[name]()
            if number >= 0:
                seconds[name].append(time.thread_time() - start)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def measure_shapes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per shape, layout, dtype and layer, and the sums over each net's shapes."""
    records = []
    for (net, shapes), (layout, memory_format), (dtype_name, dtype) in product(
        NETS.items(), FORMATS.items(), DTYPES.items()
    ):
        net_s: dict[str, float] = defaultdict(float)
        for shape, count in shapes.items():
            x, slope = (torch.randn(shape).to(options.device, dtype, memory_format=memory_format) for _ in range(2))
            works = {name: layer_work(name, make, x, slope) for name, make in layers(shape[0]).items()}
            repeats = min(10, 1 + 4_000_000 // x.numel()) * options.repeats  # short runs are noisier
            timings = compare(works, repeats=repeats)
            for name, timing in timings.items():
                net_s[name] += count * timing.median_s
            parameters = {"shape": shape, "layout": layout, "dtype": dtype_name}
            records += as_records(f"{shape} {layout} {dtype_name}", timings, parameters)
        totals = {name: Timing((seconds,)) for name, seconds in net_s.items()}
        parameters = {"net": net, "layout": layout, "dtype": dtype_name}
        records += as_records(f"{net} sum {layout} {dtype_name}", totals, parameters)
    return records


def measure_net(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per layout, dtype and layer of resnet8, batch 128 of 28 px."""
    records = []
    for (layout, memory_format), (dtype_name, dtype) in product(FORMATS.items(), DTYPES.items()):
        x = torch.randn(128, 1, 28, 28).to(options.device, memory_format=memory_format)
        works = {name: net_work(name, make, x, dtype) for name, make in layers(len(x)).items()}
        timings = compare(works, repeats=4 * options.repeats)
        parameters = {"net": "resnet8", "batch": len(x), "layout": layout, "dtype": dtype_name}
        records += as_records(f"whole resnet8 {layout} {dtype_name}", timings, parameters)
    return records


def as_records(prefix: str, timings: dict[str, Timing], parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """A record of each layer's timing, with the ratio to the baseline."""
    make: Callable[..., dict[str, Any]] = functools.partial(record, "batch norm", parameters=parameters)
    baseline = (BASELINE, timings[BASELINE])
    return [make(f"{prefix} | {name}", timing, baseline=baseline) for name, timing in timings.items()]


def main() -> None:
    """Measures, prints the sums and writes `batch_norm.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for batch_norm.jsonl")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that this thread's CPU time covers all of the work
    torch.manual_seed(0)
    records = measure_shapes(options) + measure_net(options)
    write_lines(options.output / "batch_norm.jsonl", records)
    print(table([values for values in records if "net" in values["parameters"]]))
    for kind in ("span = batch", "span = batch, collecting"):
        ratios = [v["ratio"] for v in records if v["case"].endswith(f"| {kind}") and "net" in v["parameters"]]
        print(f"{kind}: {min(ratios):.2f} to {max(ratios):.2f} x {BASELINE} (aim: at most {AIM})")


if __name__ == "__main__":
    main()
