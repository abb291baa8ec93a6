"""Compiles every kernel for an H200, without a GPU, by calling the public functions; prints the resources of each.

    python tests/support/compile_for_hopper.py [--all]

--all compiles bottlenecks of every width, and sizes of 1; the default is one width. Prints one JSON
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
    """A residual join and its gradient."""
    from megabatch.kernels.norm import join as join_passes

    x, norm = images(256), normalisation(256)
    _, relu_mask = join_passes.join(x, norm, x, span=2, triton=True)
    join_passes.join_gradient(x, x, norm, relu_mask, span=2, triton=True)


def stem() -> None:
    """The stem of a ResNet, two samples."""
    from megabatch.kernels.norm.stem import fused_bn_relu_pool

    x = torch.zeros(2, 64, 112, 112, dtype=torch.float16).requires_grad_()
    y, _, _ = fused_bn_relu_pool(x, *torch.ones(2, 64), span=2, backend="triton")
    y.backward(torch.zeros_like(y))


def statistics() -> None:
    """One span, accumulated by the same launch, and several; both kinds of sinks."""
    from megabatch.kernels.norm.passes import moments
    from megabatch.kernels.statistics import RunningAverages, SpanSums
    from megabatch.kernels.step_averages import LayerStatistics, StepAverages

    sums = SpanSums(*torch.zeros(2, 513).unbind())
    averages = RunningAverages(*torch.zeros(2, 256).unbind(), torch.tensor(0), 0.1)
    for sink in (sums, averages):
        for span in (2, 1):
            moments(images(256), span=span, eps=1e-5, sink=sink, triton=True)
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


def bottlenecks(*, every_width: bool = False) -> None:
    """Ends of bottlenecks of one width or of all, with the first convolution of a next block, and shortcuts."""
    from megabatch.kernels.gram import gram_conv1x1_norm

    for inputs in (64, 128, 256, 512) if every_width else (128,):
        x, residual = images(inputs).requires_grad_(), images(4 * inputs)
        weight = torch.zeros(4 * inputs, inputs, 1, 1)
        following = torch.zeros(inputs, 4 * inputs, 1, 1).requires_grad_()
        vector, options = torch.ones(4 * inputs), {"span": 2, "backend": "triton"}
        found = gram_conv1x1_norm(x, weight, vector, vector, residual=residual, next_weight=following, **options)
        torch.autograd.backward([found.z, found.next_y], [found.z.detach(), found.next_y.detach()])
        z = gram_conv1x1_norm(x, weight, vector, vector, relu=False, stride=(2, 2), **options).z
        z.backward(z.detach())


def sizes_of_one() -> None:
    """Sizes of 1: Triton specialises arguments equal to 1 as constants, which changes the compiled code."""
    from megabatch.kernels.gram import gram_conv1x1_norm
    from megabatch.kernels.loss import cross_entropy_with_gradient
    from megabatch.kernels.norm.batch_norm import fused_bn_act
    from megabatch.optim.kernels.lars import LarsGroup, lars_step

    # One sample of one pixel: N, H, W, spans and parts are all 1.
    one = torch.ones(1, 16, 1, 1, dtype=torch.bfloat16).requires_grad_()
    vector, label = torch.ones(16), torch.zeros(1, dtype=torch.int64)
    fused_bn_act(one, vector, vector, span=1, backend="triton")[0].backward(one.detach())
    cross_entropy_with_gradient(one.flatten(1), label, mixed_labels=label, mix_weight=torch.ones(1), backend="triton")
    gram_conv1x1_norm(one, torch.ones(16, 16, 1, 1), vector, vector, span=1, backend="triton").z.backward(one.detach())
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
    bottlenecks(every_width=everything)
    if everything:
        sizes_of_one()
    for kernel in found:
        sys.stdout.write(json.dumps(kernel) + "\n")


if __name__ == "__main__":
    main()
