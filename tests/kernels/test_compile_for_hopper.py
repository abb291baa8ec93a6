"""Compiles every kernel for an H200 without one: finds compiler errors, register spills and oversized tiles."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from limits import HANG_S

pytestmark = pytest.mark.slow

SHARED_MEMORY_BYTES = 227 * 1024
"""Limit per program on an H100 or H200 (CUDA C++ Programming Guide, compute capability 9.0)."""
WARPS = 8
REGISTERS = 65536

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton; pip install triton")


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Resources of every kernel, from another process: a process either interprets kernels or compiles them."""
    script = Path(__file__).parents[1] / "support" / "compile_for_hopper.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_triton
def test_every_kernel_compiles_within_the_limits_of_an_h200(compiled: list[dict[str, Any]]) -> None:
    sources = (Path(__file__).parents[2] / "src").rglob("_*_triton.py")
    written = {name for source in sources for name in _kernels_of(source.read_text())}
    assert {kernel["kernel"] for kernel in compiled} == written
    for kernel in compiled:
        assert kernel["local_bytes"] == 0, f"spills: {kernel}"
        assert kernel["shared_bytes"] <= SHARED_MEMORY_BYTES, kernel
        assert kernel["registers"] * 32 * WARPS <= REGISTERS, kernel


@needs_triton
def test_no_kernel_uses_atomic_additions_whose_order_varies_between_runs(
    compiled: list[dict[str, Any]],
) -> None:
    assert [kernel for kernel in compiled if kernel["atomics"]] == []


@needs_triton
def test_memory_bound_kernels_load_and_store_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    movers = ("norms", "update", "moments", "normalise", "gradient_sums", "input_gradient")
    movers += ("join", "join_gradient")
    for kernel in compiled:
        if kernel["kernel"].removesuffix("_kernel") in movers:
            assert kernel["loads_16_bytes"] > 0, kernel
        if kernel["kernel"].removesuffix("_kernel") in set(movers) - {"norms", "moments", "gradient_sums"}:
            assert kernel["stores_16_bytes"] > 0, kernel


def _kernels_of(source: str) -> list[str]:
    words = [line.split("(")[0].split() for line in source.splitlines() if line.startswith("def ")]
    return [name for _, name in words if name.endswith("_kernel")]
