"""Every job of `benchmarks/gpu.py` can be called, cheap ones run, and none imports what the GPU machine lacks."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from limits import HANG_S

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
CHEAP = ("ceilings", "optimizers", "gram", "stem", "norms")
THERE = {"torch", "torchvision", "triton", "rich", "typer", "jinja2", "matplotlib", "pillow", "numpy", "hypothesis"}
"""Packages of the GPU machine, beside those that they need and pytest's."""
IMPORT_ALL = """
import importlib.util, sys
lacks, *paths = sys.argv[1:]
sys.modules |= dict.fromkeys(lacks.split(","))  # their import raises ModuleNotFoundError
for number, path in enumerate(paths):
    spec = importlib.util.spec_from_file_location(f"file_{number}", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    calls = importlib.import_module("gpu").CALLS.values()
    yield {job.name: (job, *job.words[0].split(".")) for jobs in calls for job in jobs}
    for name in ("gpu", "gpu_schedule", "gpu_report"):
        sys.modules.pop(name, None)


def test_every_job_is_a_function_of_a_session_and_its_words(jobs):
    assert len(jobs) == 20
    for job, module, function in jobs.values():
        inspect.signature(getattr(importlib.import_module(module), function)).bind(None, *job.words[1:])


@pytest.mark.parametrize("name", CHEAP)
def test_cheap_jobs_have_results_and_no_error_on_a_cpu(jobs, tmp_path, name):
    _, module, function = jobs[name]
    session = importlib.import_module("gpu_session").Session(name, torch.device("cpu"), True, tmp_path)
    getattr(importlib.import_module(module), function)(session)
    results = importlib.import_module("gpu_schedule").read_lines(tmp_path / f"{name}.jsonl")
    assert [r for r in results if "error" in r] == []
    assert any("median_ms" in r for r in results)


def required(names):
    """Distributions that these need, with themselves."""
    found, left = set(), set(names)
    while left:
        found.add(name := left.pop())
        lines = metadata.requires(name) or [] if name in installed() else []
        left |= {plain(re.match(r"[\w.-]+", line)[0]) for line in lines if "extra ==" not in line} - found
    return found


def installed():
    return {plain(name) for owners in metadata.packages_distributions().values() for name in owners}


def plain(name):
    return name.lower().replace("_", "-")


@pytest.mark.slow
def test_jobs_and_gpu_tests_import_only_what_the_gpu_machine_has():
    there = required(THERE | {"pytest", "pytest-timeout", "pytest-xdist"}) | {"megabatch"}
    owners = metadata.packages_distributions()
    lacks = [module for module, names in owners.items() if not {plain(name) for name in names} & there]
    assert "simplejpeg" in lacks
    assert "torch" not in lacks
    paths = [*sorted((ROOT / "benchmarks").glob("gpu*.py")), *sorted((ROOT / "tests" / "gpu").glob("test_*.py"))]
    folders = [ROOT / "src", ROOT / "benchmarks", ROOT / "tests" / "support"]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, folders)))
    command = [sys.executable, "-c", IMPORT_ALL, ",".join(lacks), *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr
