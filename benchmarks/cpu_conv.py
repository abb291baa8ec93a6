"""Convolutions of whole nets on a CPU: the compiled kernels beside oneDNN's, part by part.

    python benchmarks/cpu_conv.py --output benchmarks/out [--net resnet18] [--dtype float32] [--batch 128] [--threads 2]
        [--repeats 9] [--cpu-seconds]

Shapes are those that the nets' layers meet, as often as they do. Per shape and part (output, data gradient, weight
gradient), interleaved in one process: torch's operation, which is oneDNN's, and `megabatch.kernels.cpu.conv`'s. "all"
lines add medians over a net; the data gradient of its images is left out, as nobody learns them. Errors against
float64 are of 16 images, relative in the norm. Freed memory is kept, as in training. With --cpu-seconds one thread is
timed by its own processor seconds, which wait for no other process.

In float32 only some parts are computed by the compiled kernels: those marked with an asterisk. "ours" times the kernel
in every part, "chosen" in the totals has oneDNN's time where that computes. ATEN_CPU_CAPABILITY=avx2 and
ONEDNN_MAX_CPU_ISA=AVX2 show what a processor without AVX-512 would do.
"""

import argparse
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import batch_norm
import megabatch.bench.timing as harness
from megabatch.bench.timing import Timing, Work, record, table, write_lines
from megabatch.host_memory import keep_freed_memory
from megabatch.kernels.cpu import conv as cpu_conv
from megabatch.nn.resnet import resnet18, resnet50
from megabatch.nn.small import resnet8

Compare = Callable[[dict[str, Work]], dict[str, Timing]]
PARTS = ("output", "data gradient", "weight gradient")
BASELINE = "oneDNN"
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (lambda: resnet18(num_classes=10, small_stem=True), (128, 3, 32, 32)),
    "resnet50": (resnet50, (32, 3, 224, 224)),
    "resnet8": (lambda: resnet8(in_channels=1), (128, 1, 28, 28)),
    "resnet8 wide": (lambda: resnet8(width=32), (128, 3, 32, 32)),
}


class Layer(NamedTuple):
    """A convolution of square images."""

    images: int
    inputs: int
    outputs: int
    size: int
    taps: int
    stride: int
    padding: int

    def name(self) -> str:
        """Short, for tables."""
        return f"{self.inputs}->{self.outputs} {self.taps}x{self.taps}/{self.stride} {self.size} px"

    def operations(self) -> int:
        """Multiplications and additions of one part, those with padding's zeros included."""
        out_size = (self.size + 2 * self.padding - self.taps) // self.stride + 1
        return 2 * self.images * out_size**2 * self.inputs * self.outputs * self.taps**2


def layers_of(model: nn.Module, shape: tuple[int, ...]) -> Counter[Layer]:
    """The convolutions of a forward of images of this shape, and how often each occurs."""
    layers: Counter[Layer] = Counter()

    def note(module: nn.Conv2d, inputs: tuple[Tensor], _: Tensor) -> None:
        (x,) = inputs
        sizes = (module.kernel_size[0], module.stride[0], int(module.padding[0]))
        layers[Layer(shape[0], module.in_channels, module.out_channels, x.shape[2], *sizes)] += 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape[1:]))
    return layers


def drawn(layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    """x, weight, dy."""
    x = torch.randn(layer.images, layer.inputs, layer.size, layer.size)
    weight = torch.randn(layer.outputs, layer.inputs, layer.taps, layer.taps)
    dy = torch.randn_like(functional.conv2d(x[:1], weight, stride=layer.stride, padding=layer.padding))
    dy = torch.randn(layer.images, *dy.shape[1:])
    return [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight, dy)]


def theirs(layer: Layer, x: Tensor, weight: Tensor, dy: Tensor) -> list[Callable[[], Tensor]]:
    """torch's own operations, one for each part."""

    def gradient(which: int) -> Tensor:
        mask = [which == 0, which == 1, False]
        pair = [layer.stride] * 2, [layer.padding] * 2, [1, 1]
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *pair, False, [0, 0], 1, mask)[which]

    output = lambda: functional.conv2d(x, weight, stride=layer.stride, padding=layer.padding)  # noqa: E731
    return [output, lambda: gradient(0), lambda: gradient(1)]


def ours(layer: Layer, x: Tensor, weight: Tensor, dy: Tensor) -> list[Callable[[], Tensor]]:
    """The compiled kernels, one for each part; without autograd, as torch's operations above."""

    def part(which: int, like: Tensor) -> Tensor:
        result = torch.empty_like(like)
        cpu_conv._call(which, x, weight, dy, result, layer.stride, layer.padding)
        return result

    return [lambda: part(0, dy), lambda: part(1, x), lambda: part(2, weight)]


def errors(layer: Layer, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Of oneDNN's and of our parts against float64, for 16 images."""
    layer = layer._replace(images=16)
    given, wide = drawn(layer, dtype), layer.inputs > 3
    exact = [work() for work in theirs(layer, *(t.double() for t in given))]
    found = {}
    for number, part in enumerate(PARTS):
        if wide or number != 1:
            results = (make(layer, *given)[number]().double() for make in (theirs, ours))
            first, second = (float((r - exact[number]).norm() / exact[number].norm()) for r in results)
            found[part] = (first, second)
    return found


def measure_layer(net: str, layer: Layer, dtype: torch.dtype, times: int, compare: Compare) -> list[dict[str, Any]]:
    """Two records per part: oneDNN's and ours."""
    given = drawn(layer, dtype)
    error = errors(layer, dtype)
    chosen = cpu_conv._faster_parts(*given[:2], layer.stride, layer.padding)
    records = []
    for number, part in enumerate(PARTS):
        if layer.inputs <= 3 and number == 1:
            continue
        works: dict[str, Work] = {BASELINE: theirs(layer, *given)[number], "ours": ours(layer, *given)[number]}
        parameters = {
            "net": net,
            "layer": layer.name(),
            "part": part,
            "times": times,
            "dtype": str(dtype).removeprefix("torch."),
            "is_chosen": chosen[number],
            "operations": layer.operations(),
            "errors": dict(zip(works, error[part], strict=True)),
        }
        records += as_records(f"{layer.name()} {part}", compare(works), parameters)
    return records


def as_records(prefix: str, timings: dict[str, Timing], parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Each timing beside the baseline's."""
    baseline = (BASELINE, timings[BASELINE])
    return [
        record("cpu convolution", f"{prefix} | {name}", timing, parameters=parameters, baseline=baseline)
        for name, timing in timings.items()
    ]


def line_of(records: list[dict[str, Any]]) -> str:
    """One layer as a row of a table: GFLOP/s of oneDNN and ours, and how many times as fast, part by part."""
    first = records[0]["parameters"]
    cells = [f"{first['times']} x {first['layer']}"]
    for part in PARTS:
        of_part = [v for v in records if v["parameters"]["part"] == part]
        seconds = [v["median_s"] for v in of_part]
        speeds = [f"{first['operations'] / s / 1e9:.0f}" for s in seconds]
        mark = "" if not seconds or of_part[0]["parameters"]["is_chosen"] is False else "*"
        cells.append(" / ".join([*speeds, f"{seconds[0] / seconds[1]:.2f}{mark}"]) if seconds else "-")
    return "| " + " | ".join(cells) + " |"


def totals(net: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians added over a net's layers, for each part and for all."""
    found = []
    for label, parts in (*((part, (part,)) for part in PARTS), ("all parts", PARTS)):
        seconds = dict.fromkeys((BASELINE, "ours", "chosen"), 0.0)
        for values in records:
            parameters, name = values["parameters"], values["case"].rsplit(" | ")[1]
            if parameters["part"] in parts:
                seconds[name] += parameters["times"] * values["median_s"]
                if (name == "ours") == parameters["is_chosen"]:
                    seconds["chosen"] += parameters["times"] * values["median_s"]
        found += as_records(f"{net}: {label}", {name: Timing((s,)) for name, s in seconds.items()}, {"net": net})
    return found


def errors_of(records: list[dict[str, Any]], part: str) -> list[float]:
    """Ours as a multiple of oneDNN's, layer by layer."""
    found = [v["parameters"]["errors"] for v in records if v["parameters"].get("part") == part]
    return [error["ours"] / error[BASELINE] for error in found]


def main() -> None:
    """Measures a net, prints a table and writes `cpu_conv_NET_DTYPE.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON lines")
    parser.add_argument("--net", choices=NETS, default="resnet18")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--batch", type=int, help="images; 128, or 32 for resnet50")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cpu-seconds", action="store_true", help="of one thread, instead of elapsed seconds")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    assert cpu_conv.is_available(dtype), (
        "needs AVX-512 BF16, or AVX2 for float32, and the library: python -m megabatch.kernels.cpu.library"
    )
    keep_freed_memory()
    torch.set_num_threads(1 if options.cpu_seconds else options.threads)
    torch.manual_seed(0)
    make, shape = NETS[options.net]
    shape = (options.batch or shape[0], *shape[1:])
    chosen = batch_norm.compare if options.cpu_seconds else harness.compare
    compare = functools.partial(chosen, repeats=options.repeats)
    records = []
    setting = f"{options.net}, {options.dtype}, {shape[0]} images, {torch.get_num_threads()} threads"
    print(f"{setting}; GFLOP/s of {BASELINE} / ours / times as fast")
    for layer, times in layers_of(make(), shape).items():
        found = measure_layer(options.net, layer, dtype, times, compare)
        print(line_of(found), flush=True)
        records += found
    sums = totals(options.net, records)
    worst = {part: max(errors_of(records, part)) for part in PARTS}
    print("largest error of ours / oneDNN's:", ", ".join(f"{part} {ratio:.3f}" for part, ratio in worst.items()))
    print(table(sums))
    write_lines(options.output / f"cpu_conv_{options.net.replace(' ', '_')}_{options.dtype}.jsonl", [*records, *sums])


if __name__ == "__main__":
    main()
