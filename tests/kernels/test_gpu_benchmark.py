"""Runs every path of `benchmarks/gpu.py` that a CPU can run, to find errors before using GPU time."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from limits import HANG_S

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_S, check=False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """Results and printed table of all sections, at tiny sizes."""
    folder = tmp_path_factory.mktemp("gpu")
    done = run("--quick", "--output", str(folder))
    assert done.returncode == 0, done.stderr
    assert (folder / "gpu.txt").read_text() == done.stdout
    assert "compiles about 25 kernels" in done.stderr
    return json.loads((folder / "gpu.json").read_text()), done.stdout


def test_every_section_runs_without_error(quick: tuple[list[dict[str, Any]], str]) -> None:
    results, table = quick
    sections = ("environment", "ceilings", "optimizers", "loss", "batch_norm", "stem", "gradients", "input", "conv1x1")
    assert {result["section"] for result in results} == {*sections, "profile", "step", "choices", "compiled"}
    missing = set() if importlib.util.find_spec("torchvision") else {"decode_jpeg"}
    assert {result["case"] for result in results if "error" in result} == missing
    assert all(result["case"] in table for result in results)


def test_the_fused_model_has_the_gradients_of_the_plain_one(quick: tuple[list[dict[str, Any]], str]) -> None:
    plain, fused = (result for result in quick[0] if result["section"] == "gradients")
    assert fused["of_all"] < 1.2 * plain["of_all"]
    assert fused["median"] < 1.2 * plain["median"]


def test_a_section_that_fails_loses_no_other(tmp_path: Path) -> None:
    done = run("--quick", "--section", "input", "--section", "loss", "--output", str(tmp_path))
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0
    assert [result["section"] for result in results][-2:] == ["loss", "loss"]


def test_full_sizes_on_a_cpu_are_refused(tmp_path: Path) -> None:
    done = run("--output", str(tmp_path))
    assert done.returncode == 2
    assert "--quick alone" in done.stderr
