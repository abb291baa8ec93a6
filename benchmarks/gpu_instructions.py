"""Machine instructions of our kernels for an H200, per KB that they move: counted without a GPU.

    python benchmarks/gpu_instructions.py [--batch 1024]

Compiles each launch of a fused ResNet-50's forward and backward in float16 for compute capability 9.0, disassembles it,
and prints per kernel and shape: calls in a step, MB moved by all of them, and warp-instructions per KB. A call's
instructions are those of its code times its warps and programs; those of loops count once per tile. Both sides of a
branch count. Bytes are its tensors, each once. Products of many channels are bound by arithmetic, not by instructions
per KB.

A multiprocessor of an H200 gets 32.3 KB a microsecond at the copy rate and can issue about 7,600 instructions in it:
235 per KB is the ceiling at four instructions per cycle; a kernel that reaches two stays at the copy rate up to 120.
"""

import argparse
import functools
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_traffic import fake_step, num_bytes, redirected

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))
from compile_for_hopper import Hopper, tool

CEILING, GOAL = 235, 120
"""Warp-instructions per KB: four a cycle, and two a cycle, at an H200's copy rate."""
OUTER = (("rows_per_part", "block_rows"), ("num_parts", "block_parts"))
"""Arguments that give the length of a kernel's outer loop, and of one step of it."""
ALGEBRA = {"fold_kernel", "filter_gradient_kernel", "correction_kernel"}
"""Kernels on filters, whose instructions do not grow with the rows."""
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*?);", re.M)
_MOVES = re.compile(r"LD|ST|UTMA|HGMMA|HMMA")
_TARGET = re.compile(r"0x([0-9a-f]+)")


class Launch(NamedTuple):
    """One compiled launch: values of its arguments by name, and its code."""

    name: str
    values: Mapping[str, Any]
    programs: int
    kernel: Any

    def shape(self) -> str:
        """Channels, or input and output channels, and rows of the tile."""
        names = ("inner", "other_inner", "inputs", "columns", "outputs")
        return " -> ".join(str(self.values[name]) for name in names if name in self.values)

    def num_bytes(self) -> int:
        """Bytes of the tensors that it reads or writes, each once."""
        return num_bytes(self.values.values())

    def num_instructions(self) -> float:
        """Warp-instructions of all programs."""
        trips = next((_trips(self.values, *pair) for pair in OUTER if set(pair) <= self.values.keys()), 1)
        if "inner" in self.values:
            trips = _trips(self.values, "inner", "block_inner")
        per_warp = weighted(instructions(_disassembled(self.kernel.asm["cubin"])), (trips,))
        return per_warp * self.programs * int(self.kernel.metadata.num_warps)


class Instruction(NamedTuple):
    """Address, operation, and the address that it may branch to."""

    address: int
    operation: str
    target: int | None


def compiled(make_step: Callable[[], Callable[[], object]]) -> list[Launch]:
    """Compiles every kernel that a step launches, on tensors without values; returns the launches."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction, MockTensor

    run = JITFunction.run
    launches: list[Launch] = []

    def launch(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        grid = options["grid"]
        mocks = [MockTensor(a.dtype) if isinstance(a, Tensor) else a for a in args]
        others = {name: MockTensor(a.dtype) if isinstance(a, Tensor) else a for name, a in options.items()}
        code = run(kernel, *mocks, **{**others, "warmup": True})
        values = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
        sizes = grid(values) if callable(grid) else grid
        launches.append(Launch(kernel.__name__, values, prod(sizes), code))

    driver.set_active(Hopper())
    with redirected(launch):
        make_step()()
    return launches


def instructions(sass: str) -> list[Instruction]:
    """Parses a disassembly by cuobjdump."""
    found = []
    for address, operation, rest in _LINE.findall(sass):
        target = _TARGET.search(rest) if operation.startswith("BRA") else None
        found.append(Instruction(int(address, 16), operation, int(target[1], 16) if target else None))
    return found


def weighted(code: Sequence[Instruction], trips: Sequence[float]) -> float:
    """Instructions that one warp runs; `trips` of the outermost loops, those within them, and so on.

    A loop is what lies between a branch and an earlier target, unless it moves nothing: then it waits for a barrier.
    What follows the last EXIT is left out: rare cases, such as waiting again, and padding.
    """
    exits = [i for i, c in enumerate(code) if c.operation.startswith("EXIT")]
    main = code[: exits[-1] + 1] if exits else code
    ends: dict[int, int] = {}
    for c in main:
        if c.target is not None and c.target < c.address:
            ends[c.target] = max(c.address, ends.get(c.target, 0))
    inside = {first: [c for c in main if first <= c.address <= end] for first, end in ends.items()}
    loops = [(first, ends[first]) for first, body in inside.items() if any(_MOVES.match(c.operation) for c in body)]
    return sum(
        prod(trips[: sum(first <= c.address <= end for first, end in loops)]) for c in main if c.operation != "NOP"
    )


def _trips(values: Mapping[str, Any], length: str, step: str = "") -> float:
    return max(1.0, -(-values[length] // values.get(step, 1)))


@functools.cache
def _disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return tool("cuobjdump", "--dump-sass", path)


def table(launches: Sequence[Launch]) -> str:
    """One line per kernel and shape, most bytes first."""
    groups: dict[tuple[str, str], list[Launch]] = defaultdict(list)
    for launch in launches:
        if launch.name in ALGEBRA:
            continue
        groups[launch.name, launch.shape()].append(launch)
    rows = []
    for (name, shape), group in groups.items():
        num_bytes = sum(launch.num_bytes() for launch in group)
        rows.append((num_bytes, name, shape, len(group), sum(launch.num_instructions() for launch in group)))
    head = f"{'kernel':28} {'channels':14} {'calls':>5} {'MB':>9} {'instructions/KB':>15}"
    lines = [f"{head}  (ceiling {CEILING}, goal {GOAL})"]
    for num_bytes, name, shape, calls, number in sorted(rows, reverse=True):
        per_kb = number / (num_bytes / 1e3)
        mark = " *" if per_kb > GOAL else ""
        lines.append(f"{name:28} {shape:14} {calls:5} {num_bytes / 1e6:9,.1f} {per_kb:15,.0f}{mark}")
    return "\n".join(lines)


def main() -> None:
    """Prints the table of a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024, help="images (default 1024)")
    chosen = parser.parse_args()
    launches = compiled(functools.partial(fake_step, chosen.batch, 224, dtype=torch.float16))
    sys.stdout.write(table(launches) + "\n")


if __name__ == "__main__":
    main()
