"""Timing by `benchmarks/gpu.py`, on a stand-in GPU: what is timed, and that a case which fails costs no other."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import stand_in_device
import torch
from stand_in_gpu import CUDA, StandInGpu

from megabatch.bench.timing import Timing, measure

# torch warns of parts of its own when its compiler is imported, which emptying the caches does.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """The benchmark's modules of these names, imported anew."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("gpu_session", "gpu_kernels", "gpu_checks", "optimizer")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return {name: importlib.import_module(name) for name in names}


def open_session(modules, folder):
    return modules["gpu_session"].Session("job", CUDA, quick=True, output=folder)


def results(folder):
    found = map(json.loads, (folder / "job.jsonl").read_text().splitlines())
    return [result for result in found if not result.get("begun")]


def test_queued_runs_are_timed_behind_one_that_hides_the_launch(modules, monkeypatch):
    log = []
    monkeypatch.setattr(stand_in_device.Event, "record", lambda *_: log.append("event"))
    with StandInGpu(elapsed_ms=lambda: 6.0):
        timing = measure(lambda: log.append("run"), warmup=0, repeats=2, queued=3)
    assert log == ["run", "event", "run", "run", "run", "event"] * 2
    assert timing.seconds == pytest.approx((0.002, 0.002))


def test_a_session_times_graphs_behind_another_launch(modules, tmp_path, monkeypatch):
    log = []
    monkeypatch.setattr(stand_in_device.Event, "record", lambda *_: log.append("event"))
    monkeypatch.setattr(stand_in_device.Graph, "replay", lambda _: log.append("replay"))
    with StandInGpu():
        open_session(modules, tmp_path).time({"work": lambda: torch.ones(2, device=CUDA)})
    assert log[-6:] == ["replay", "event", "replay", "replay", "replay", "event"]


def test_a_work_that_cannot_be_captured_is_a_result_and_the_others_are_timed(modules, tmp_path):
    x = []
    with StandInGpu():
        x.append(torch.ones(2, device=CUDA))
        session = open_session(modules, tmp_path)
        works = {"reads": lambda: x[0].sum().item(), "adds": lambda: x[0].add_(1)}
        assert list(session.time(works)) == ["adds"]
    (failed,) = results(tmp_path)
    assert failed["case"] == "reads"
    assert "while a graph is captured" in failed["error"]


@pytest.mark.parametrize("fails", ["making", "stepping"])
def test_an_optimizer_that_fails_costs_no_other(modules, tmp_path, monkeypatch, fails):
    kernels = modules["gpu_kernels"]

    class Broken(torch.optim.SGD):
        def __init__(self, groups, **_):
            if fails == "making":
                raise RuntimeError("no kernel")
            super().__init__([parameter for group in groups for parameter in group["params"]], lr=0.1)

        def step(self, _=None):
            raise RuntimeError("no kernel")

    monkeypatch.setattr(kernels, "LAMB", Broken)
    kernels.optimizers(modules["gpu_session"].Session("job", torch.device("cpu"), quick=True, output=tmp_path))
    errors = [result["case"] for result in results(tmp_path) if "error" in result]
    timed = [result["case"] for result in results(tmp_path) if "median_ms" in result]
    assert errors == ["LAMB", "LAMB foreach"]
    assert len(timed) == 6


def test_a_case_that_an_earlier_process_began_is_not_run_again(modules, tmp_path):
    make = modules["gpu_session"].Session
    make("job", torch.device("cpu"), quick=True, output=tmp_path).guarded("first", lambda: None)
    again = make("job", torch.device("cpu"), quick=True, output=tmp_path)
    ran = []
    for case in ("first", "second"):
        again.guarded(case, lambda case=case: ran.append(case))
    assert ran == ["second"]


def test_ceilings_of_an_earlier_job_give_shares_of_the_copy_rate(modules, tmp_path):
    (tmp_path / "ceilings.jsonl").write_text('{"case": "copy", "copy_bytes_per_s": 4e12}\n')
    session = modules["gpu_session"].Session("job", torch.device("cpu"), quick=True, output=tmp_path)
    assert session.bandwidth(2e9, Timing((1e-3,)))["of_copy_rate"] == pytest.approx(0.5)


def test_a_report_of_tests_gives_counts_and_failures(modules, tmp_path):
    (tmp_path / "tests.xml").write_text(
        """<testsuites><testsuite><testcase classname="a" name="good"/>
        <testcase classname="a" name="bad"><failure message="AssertionError: 1 != 2&#10;more"/></testcase>
        <testcase classname="a" name="broken"><error message="no GPU"/></testcase>
        <testcase classname="a" name="left out"><skipped message="x"/></testcase></testsuite></testsuites>"""
    )
    modules["gpu_checks"].read_report(open_session(modules, tmp_path), tmp_path / "tests.xml", 3.0)
    counts, bad, broken = results(tmp_path)
    assert (counts["passed"], counts["failed"], counts["skipped_tests"]) == (1, 2, 1)
    assert bad["case"] == "a::bad"
    assert bad["error"] == "AssertionError: 1 != 2"
    assert broken["error"] == "no GPU"
