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
NORMS, JOINS, SHORTCUTS, CONVOLUTIONS = 53, 16, 4, 53
SMALL_FILTERS = 5
"""Convolutions whose weight-gradient tiles fill the GPU without dividing the rows into parts."""

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
def test_a_step_with_torch_convolutions_launches_each_pass_once_per_layer() -> None:
    launches, megabytes = count()
    assert launches["torch's convolutions"] == 3 * CONVOLUTIONS - 1
    assert launches["moments_kernel"] == launches["statistics_kernel"] == NORMS
    assert launches["normalise_kernel"] == launches["gradient_sums_kernel"] == NORMS - 1 - JOINS - SHORTCUTS
    assert launches["join_kernel"] == launches["join_gradient_kernel"] == JOINS
    assert launches["two_input_gradients_kernel"] == SHORTCUTS
    assert launches["input_gradient_kernel"] == NORMS - 1 - 2 * SHORTCUTS
    assert launches["add_parts_kernel"] == NORMS - SHORTCUTS
    assert launches["other operations of torch"] == 17
    assert "keep_kernel" not in launches  # with one span, statistics_kernel accumulates the statistics
    assert launches["all"] == 478
    assert megabytes["all"] - megabytes["torch's convolutions"] < 200


@needs_triton
def test_1x1_convolution_kernels_fuse_moments_sums_and_the_batch_norm_backward() -> None:
    launches, megabytes = count("--kernels")
    products = 2 * JOINS - 1
    for kind in ("forward_kernel", "data_gradient_kernel", "weight_gradient_kernel"):
        assert launches[kind] == products
    assert launches["moments_kernel"] == NORMS - products
    assert launches["join_gradient_kernel"] == 1
    assert launches["add_parts_kernel"] == NORMS - SHORTCUTS + products - SMALL_FILTERS
    deferred = products - SHORTCUTS  # each but those whose output a join of two batch norms reads
    assert launches["input_gradient_kernel"] == NORMS - 1 - 2 * SHORTCUTS - deferred
    assert launches["all"] == 399
    assert megabytes["all"] < 280
