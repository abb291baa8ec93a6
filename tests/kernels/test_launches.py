"""Number of launches of a fused ResNet-50 step: at a batch of 32, launch overhead dominates."""

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

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_traffic.py"
NORMS, BLOCKS, SHORTCUTS, CONVOLUTIONS = 53, 16, 4, 53
FEW_ROWS = 3
"""Blocks at 7 px, whose spans of 32 have too few rows for the Gram form; its shortcut has them as well."""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton; pip install triton")


def count(*arguments: str) -> tuple[dict[str, int], dict[str, float]]:
    """Launches, and megabytes per image, of each kind; in another process, in which kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    return ({row["kind"]: row[what] for row in rows} for what in ("launches", "mb_per_image"))  # type: ignore[return-value]


@needs_triton
def test_each_pass_is_launched_once_per_layer() -> None:
    launches, megabytes = count()
    grams, plain = BLOCKS - FEW_ROWS + SHORTCUTS - 1, NORMS - 1 - (BLOCKS - FEW_ROWS + SHORTCUTS - 1)
    assert launches["gram_kernel"] == 2 * grams
    assert launches["fold_kernel"] == launches["filter_gradient_kernel"] == launches["correction_kernel"] == grams
    chained = BLOCKS - FEW_ROWS  # those with a next block, whose first data gradient is a product too
    assert launches["product_kernel"] == 2 * grams + chained
    assert launches["torch's convolutions"] == 3 * (CONVOLUTIONS - grams) - 1 - chained
    assert launches["moments_kernel"] == launches["statistics_kernel"] == plain + 1
    assert launches["join_kernel"] == launches["join_gradient_kernel"] == FEW_ROWS
    assert launches["input_gradient_kernel"] == plain
    assert launches["other operations of torch"] == 25
    assert "keep_kernel" not in launches  # with one span, the launch that computes the statistics accumulates them
    assert launches["all"] == 502
    assert megabytes["all"] < 270


@needs_triton
def test_fused_steps_of_large_batches_move_half_of_what_torchs_operations_move() -> None:
    (_, fused), (_, plain) = count("--batch", "1024"), count("--batch", "1024", "--fusion", "plain")
    assert fused["all"] < 230
    assert plain["all"] > 440
