"""Compiles every kernel for an H200, without a GPU, by calling the public functions; prints the resources of each.

    python tests/support/compile_for_hopper.py [--all]

--all compiles every tiling of the convolutions, and sizes of 1; the default is one tiling of each. Prints one JSON
line per compiled variant: registers per thread, bytes spilled to local memory, bytes of shared memory, and the number
of machine instructions of each kind in INSTRUCTIONS. No kernel runs, so results of the calls are meaningless.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from megabatch.kernels import dispatch

INSTRUCTIONS = {
    "loads_16_bytes": r"LDG\.E\.128|LDG\.E\S*\.128",
    "stores_16_bytes": r"STG\.E\S*\.128",
    "copies_ahead": r"LDGSTS|UTMALDG",
    "matrix": r"HGMMA",
    "slow_matrix": r"HMMA",
    "atomics": r"\b(?:ATOM|ATOMG|RED)\.",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Hopper:
    """Stub of Triton's driver that reports compute capability 9.0; compiling needs no more of it."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def compile_only() -> list[dict[str, Any]]:
    """Makes every launch compile and record its kernel instead of running it; returns the list of records.

    A variant that was compiled before is not recorded again.
    """
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    run = JITFunction.run

    @functools.wraps(run)
    def record(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        # warmup=True stops after compilation.
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            found.append(resources(self.__name__, kernel))
        return kernel

    JITFunction.run = record
    # The wrappers accept CPU tensors only if they believe that the interpreter runs.
    driver.set_active(Hopper())
    dispatch.interprets = lambda: True
    return found


def resources(name: str, kernel: Any) -> dict[str, Any]:
    """Resources and instruction counts of a compiled kernel, by cuobjdump."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", path)
        code = tool("cuobjdump", "--dump-sass", path)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    counts = {kind: len(re.findall(pattern, code)) for kind, pattern in INSTRUCTIONS.items()}
    spilled = {"registers": found["REG"], "local_bytes": found["LOCAL"] + found["STACK"]}
    return {"kernel": name, **spilled, "shared_bytes": kernel.metadata.shared, **counts}


def tool(name: str, *arguments: object) -> str:
    """Output of one of the NVIDIA tools that Triton ships."""
    words = [str(TOOLS / name), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def lars() -> None:
    """Tensors as in ResNet-50: float32 weights with bfloat16 copies, float32 or bfloat16 gradients."""
    from megabatch.optim.kernels.lars import LarsGroup, lars_step

    scalar = torch.tensor(0.1)
    for gradient in (torch.float32, torch.bfloat16):
        weights = [torch.zeros(64, 64, 3, 3), torch.zeros(64)]
        group = LarsGroup(
            weights=weights,
            gradients=[torch.zeros_like(w, dtype=gradient) for w in weights],
            buffers=[torch.zeros_like(w) for w in weights],
            copies=[torch.zeros_like(w, dtype=torch.bfloat16) for w in weights],
            lr=scalar,
            momentum=scalar,
            weight_decay=scalar,
            previous_lr=scalar,
        )
        lars_step([group], backend="triton")


def batch_norm() -> None:
    """The narrowest and a wide layer, with and without a residual."""
    from megabatch.kernels.norm.batch_norm import fused_bn_act

    for channels, pixels in ((64, 56), (1024, 14)):
        for with_residual in (False, True):
            x = torch.zeros(32, channels, pixels, pixels, dtype=torch.float16).requires_grad_()
            residual = torch.zeros_like(x) if with_residual else None
            vector = torch.ones(channels)
            y, _, _ = fused_bn_act(x, vector, vector, span=32, residual=residual, backend="triton")
            y.backward(torch.zeros_like(y))


def join() -> None:
    """Joins with and without a batch norm in the shortcut, and their gradients."""
    from megabatch.kernels.norm import join as join_passes

    x, norm = images(256), normalisation(256)
    for other in (None, norm):
        _, relu_mask = join_passes.join(x, norm, x, residual_norm=other, span=2, triton=True)
        join_passes.join_gradient(x, x, norm, relu_mask, addend=x, residual=x, residual_norm=other, span=2, triton=True)
    join_passes.two_input_gradients(x, x, norm, x, norm, torch.zeros(1, 4, 256), span=2, triton=True)


def stem() -> None:
    """The stem of a ResNet, two samples."""
    from megabatch.kernels.norm.stem import fused_bn_relu_pool

    x = torch.zeros(2, 64, 112, 112, dtype=torch.float16).requires_grad_()
    y, _, _ = fused_bn_relu_pool(x, *torch.ones(2, 64), span=2, backend="triton")
    y.backward(torch.zeros_like(y))


def statistics() -> None:
    """One span, accumulated by the same launch, and several; both kinds of sinks."""
    from megabatch.kernels.norm.passes import measure
    from megabatch.kernels.statistics import RunningAverages, SpanSums
    from megabatch.kernels.step_averages import LayerStatistics, StepAverages

    sums = SpanSums(*torch.zeros(2, 513).unbind())
    averages = RunningAverages(*torch.zeros(2, 256).unbind(), torch.tensor(0), 0.1)
    for sink in (sums, averages):
        for span in (2, 1):
            measure(images(256), span=span, eps=1e-5, sink=sink, backend="triton")
    layers = [LayerStatistics(sums.first, sums.total, averages.mean, averages.var, averages.num_forwards)]
    kernels = StepAverages()
    for first in (True, False):
        kernels.move(layers, kernels.take(layers, first=first), 0.1, torch.zeros(()) if first else None)


def loss() -> None:
    """A thousand classes, with mixed labels and without."""
    from megabatch.kernels.loss import fused_cross_entropy_sum

    logits, labels = torch.zeros(32, 1000, dtype=torch.float16), torch.zeros(32, dtype=torch.int64)
    fused_cross_entropy_sum(logits, labels, label_smoothing=0.1, backend="triton")
    fused_cross_entropy_sum(logits, labels, mixed_labels=labels, mix_weight=0.5, backend="triton")


def crop() -> None:
    """One image to 224 px."""
    from megabatch.kernels.crop_resize import crop_and_resize

    image = torch.zeros(375, 500, 3, dtype=torch.uint8)
    box = torch.tensor([[0, 0, 375, 500]])
    crop_and_resize([image], box, size=224, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), backend="triton")


def convolutions(*, every_tiling: bool = False) -> None:
    """One tiling or all, each on a layer with as many channels as its tile is wide."""
    import megabatch.kernels.bottleneck.conv1x1 as module

    some = slice(None) if every_tiling else slice(1, 2)
    for tiling in module.FORWARD_TILINGS[some]:
        x, weight = images(tiling.inputs), torch.zeros(tiling.outputs, tiling.inputs, dtype=torch.float16)
        for given in (normalisation(tiling.inputs), None)[: 2 if every_tiling else 1]:
            module.conv1x1_forward(x, weight, span=2, normalisation=given, tiling=tiling, backend="triton")
    # The data gradient has variants: behind a plain batch norm, a join, and a join with a batch norm in its shortcut.
    for tiling in module.DATA_GRADIENT_TILINGS[some]:
        x, weight = images(tiling.inputs), torch.zeros(tiling.outputs, tiling.inputs, dtype=torch.float16)
        dy, given = images(tiling.outputs), normalisation(tiling.inputs)
        bits = torch.zeros(x.numel() // tiling.inputs, tiling.inputs // 8, dtype=torch.uint8)
        join = {"relu_mask": bits, "addend": x}
        shortcut = {**join, "residual": x, "residual_norm": given}
        for behind in ({}, join, shortcut)[: 3 if every_tiling else 1]:
            for left in (None, *deferred_passes(dy))[:: 1 if every_tiling else 2]:
                options = {"span": 2, "deferred": left, "tiling": tiling, "backend": "triton"}
                module.conv1x1_data_gradient(dy, weight, x, given, **behind, **options)
    for tiling in module.WEIGHT_GRADIENT_TILINGS[some]:
        dy, x, given = images(tiling.outputs), images(tiling.inputs), normalisation(tiling.inputs)
        for left in (None, *deferred_passes(dy))[:: 1 if every_tiling else 2]:
            options = {"span": 2, "deferred": left, "tiling": tiling.with_deferred() if left else tiling}
            module.conv1x1_weight_gradient(dy, x, normalisation=given, **options, backend="triton")


def deferred_passes(y: torch.Tensor) -> list[Any]:
    """Deferred batch norm backwards of a convolution's output y, without and with a ReLU."""
    from megabatch.kernels.bottleneck.handover import DeferredNormBackward

    return [
        DeferredNormBackward(y, normalisation(y.shape[1]), torch.zeros(1, 2, y.shape[1]), relu)
        for relu in (False, True)
    ]


def sizes_of_one() -> None:
    """Sizes of 1: Triton specialises arguments equal to 1 as constants, which changes the compiled code."""
    from megabatch.kernels.bottleneck.conv1x1 import (
        Tiling,
        conv1x1_data_gradient,
        conv1x1_forward,
        conv1x1_weight_gradient,
    )
    from megabatch.kernels.loss import cross_entropy_with_gradient
    from megabatch.kernels.norm.batch_norm import fused_bn_act
    from megabatch.kernels.norm.passes import Normalisation
    from megabatch.optim.kernels.lars import LarsGroup, lars_step

    # One sample of one pixel: N, H, W, spans and parts are all 1.
    one = torch.ones(1, 16, 1, 1, dtype=torch.bfloat16)
    vector, label = torch.ones(16), torch.zeros(1, dtype=torch.int64)
    fused_bn_act(one.requires_grad_(), vector, vector, span=1, backend="triton")[0].backward(one)
    cross_entropy_with_gradient(one.flatten(1), label, mixed_labels=label, mix_weight=torch.ones(1), backend="triton")
    given, tiling = Normalisation(vector[None], vector[None], vector, vector), Tiling(64, 64, 64, 4, 3)
    weight = torch.ones(16, 16, dtype=torch.bfloat16)
    conv1x1_forward(one, weight, span=1, normalisation=given, tiling=tiling, backend="triton")
    conv1x1_data_gradient(one, weight, one, given, span=1, tiling=tiling, backend="triton")
    conv1x1_weight_gradient(one, one, span=1, normalisation=given, tiling=tiling, backend="triton")
    for gradient in (torch.zeros(4), torch.zeros(5)[1:]):
        tensors = {name: [torch.zeros(4)] for name in ("weights", "buffers")}
        values = {name: torch.tensor(0.1) for name in ("lr", "momentum", "weight_decay", "previous_lr")}
        lars_step([LarsGroup(**tensors, **values, gradients=[gradient], copies=[None])], backend="triton")


def images(channels: int) -> torch.Tensor:
    return torch.zeros(2, channels, 14, 14, dtype=torch.float16).contiguous(memory_format=torch.channels_last)


def normalisation(channels: int) -> Any:
    from megabatch.kernels.norm.passes import Normalisation

    return Normalisation(*torch.ones(2, 1, channels), *torch.ones(2, channels))


ALL: tuple[Callable[[], None], ...] = (lars, batch_norm, join, stem, statistics, loss, crop)


def main() -> None:
    """Compiles all kernels and prints one line each."""
    torch.set_num_threads(1)
    found = compile_only()
    for kernels in ALL:
        kernels()
    everything = "--all" in sys.argv
    convolutions(every_tiling=everything)
    if everything:
        sizes_of_one()
    for kernel in found:
        sys.stdout.write(json.dumps(kernel) + "\n")


if __name__ == "__main__":
    main()
