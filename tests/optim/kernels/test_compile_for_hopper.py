"""The optimizers' kernels compile for an H200 within its limits, for every kind of step and every dtype."""

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

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton; pip install triton")

LAUNCHES = {
    ("lars", "norms_kernel"),
    ("lars", "update_kernel"),
    ("sgd", "update_kernel"),
    ("sgd corrected", "norms_kernel"),
    ("lamb", "norms_kernel"),
    ("lamb", "update_kernel"),
    ("rmsprop", "update_kernel"),
}
"""`sgd corrected` has no update kernel of its own: it uses that of `lars`, which is compiled already."""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Records of all kernels, from a process without the interpreter: a process cannot both compile and interpret."""
    script = Path(__file__).parents[2] / "support" / "compile_optimizers_for_hopper.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_triton
def test_every_kind_of_step_compiles_without_spilling_or_atomic_operations(compiled: list[dict[str, Any]]) -> None:
    assert {(kernel["optimizer"], kernel["kernel"]) for kernel in compiled} == LAUNCHES
    for kernel in compiled:
        assert kernel["local_bytes"] == 0, f"spills: {kernel}"
        assert kernel["atomics"] == 0, kernel
        assert kernel["registers"] * 32 * 8 <= 65536, kernel


@needs_triton
def test_aligned_tensors_move_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    """Exactly one variant of each kernel, that for unaligned addresses, moves fewer bytes at a time."""
    for optimizer, name in LAUNCHES:
        variants = [k for k in compiled if (k["optimizer"], k["kernel"]) == (optimizer, name)]
        assert sum(kernel["loads_16_bytes"] == 0 for kernel in variants) == 1
        if name == "update_kernel":
            assert sum(kernel["stores_16_bytes"] == 0 for kernel in variants) == 1
