"""Timing by `benchmarks/gpu.py`, on a stand-in GPU: what is timed, and that a case which fails costs no other."""

import importlib
import sys
from pathlib import Path

import pytest
import stand_in_device
import torch
from stand_in_gpu import CUDA, StandInGpu

from megabatch.bench.timing import measure

# torch warns of parts of its own when its compiler is imported, which emptying the caches does.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    """The benchmark's modules of these names, imported anew."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("gpu_session", "gpu_kernels", "optimizer")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return {name: importlib.import_module(name) for name in names}


def open_session(modules, folder):
    return modules["gpu_session"].Session(CUDA, quick=True, output=folder, limit_s=600.0)


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
        open_session(modules, tmp_path).time("loss", "", {"work": lambda: torch.ones(2, device=CUDA)})
    assert log[-6:] == ["replay", "event", "replay", "replay", "replay", "event"]


def test_a_work_that_cannot_be_captured_is_a_result_and_the_others_are_timed(modules, tmp_path):
    x = []
    with StandInGpu():
        x.append(torch.ones(2, device=CUDA))
        session = open_session(modules, tmp_path)
        works = {"reads": lambda: x[0].sum().item(), "adds": lambda: x[0].add_(1)}
        assert list(session.time("loss", "1000", works)) == ["adds"]
    (failed,) = session.results
    assert (failed["section"], failed["case"]) == ("loss", "1000, reads")
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
    session = modules["gpu_session"].Session(torch.device("cpu"), quick=True, output=tmp_path, limit_s=600.0)
    kernels.optimizers(session)
    errors = [result["case"] for result in session.results if "error" in result]
    timed = [result["case"] for result in session.results if "median_ms" in result]
    assert errors == ["LAMB", "LAMB foreach"]
    assert len(timed) == 6
