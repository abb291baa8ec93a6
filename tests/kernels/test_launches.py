"""What a fused ResNet-50's forward and backward launches: at a batch of 32 launches are the time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_traffic.py"
NORMS, JOINS, SHORTCUTS, CONVOLUTIONS = 53, 16, 4, 53
SMALL_FILTERS = 5
"""Whose tiles fill the GPU without the rows in several parts."""

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton; pip install triton")


def count(*arguments: str) -> tuple[dict[str, int], dict[str, float]]:
    """Launches and megabytes an image of each kind; in a process of its own, where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    return ({row["kind"]: row[what] for row in rows} for what in ("launches", "mb_per_image"))  # type: ignore[return-value]


@needs_triton
def test_a_step_of_torchs_convolutions_and_our_passes_launches_no_more_than_its_parts_need() -> None:
    launches, megabytes = count()
    assert launches["torch's convolutions"] == 3 * CONVOLUTIONS - 1
    assert launches["moments_kernel"] == launches["statistics_kernel"] == NORMS
    assert launches["normalise_kernel"] == launches["gradient_sums_kernel"] == NORMS - 1 - JOINS - SHORTCUTS
    assert launches["join_kernel"] == launches["join_gradient_kernel"] == JOINS
    assert launches["two_input_gradients_kernel"] == SHORTCUTS
    assert launches["input_gradient_kernel"] == NORMS - 1 - 2 * SHORTCUTS
    assert launches["add_parts_kernel"] == NORMS - SHORTCUTS
    assert launches["other operations of torch"] == 17
    assert "keep_kernel" not in launches  # of one span the statistics are kept as they are computed
    assert launches["all"] == 478
    assert megabytes["all"] - megabytes["torch's convolutions"] < 200


@needs_triton
def test_kernels_of_1x1_convolutions_take_moments_sums_and_batch_norms_backward_with_them() -> None:
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
