"""The optimizer benchmark: tensor shapes, every case equally often, ratios of medians."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megabatch.errors import UserError

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "harness", raising=False)
    return importlib.import_module("harness")


@pytest.fixture
def benchmark(harness: ModuleType) -> ModuleType:
    return importlib.import_module("optimizer")


def test_the_shapes_are_those_of_resnet50(benchmark: ModuleType) -> None:
    shapes = benchmark.resnet50_shapes()
    assert len(shapes) == 161
    assert sum(torch.Size(shape).numel() for shape in shapes) == 25_557_032
    assert sum(torch.Size(s).numel() for s in shapes if len(s) == 4) == 23_454_912
    assert sum(len(s) > 1 for s in shapes) == 54


def test_every_case_steps_without_error(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "resnet50_shapes", lambda: [(4, 3, 3, 3), (4,), (5, 4), (5,)])
    names = []
    for name, make in benchmark.cases("cpu"):
        groups = benchmark.groups(benchmark.tensors("cpu"))
        before = [p.detach().clone() for p in groups[0]["params"]]
        make(groups).step()
        assert not all(torch.equal(a, b) for a, b in zip(before, groups[0]["params"], strict=True)), name
        names.append(name)
    assert names[0] == benchmark.BASELINE
    assert len(names) == len(set(names))
    assert list(benchmark.works("cpu")) == names


def test_the_cases_for_a_gpu_are_capturable_and_their_bytes_are_counted(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cases with fused=True raise here, since the kernels need a GPU."""
    monkeypatch.setattr(benchmark, "resnet50_shapes", lambda: [(4, 3, 3, 3), (4,)])
    monkeypatch.setattr("megabatch.optim.engine.fused.interprets", lambda: False)
    names = []
    for name, make in benchmark._ours_on_a_gpu("cpu"):
        optimizer = make(benchmark.groups(benchmark.tensors("cpu")))
        assert all(group["capturable"] for group in optimizer.param_groups)
        if optimizer.param_groups[0]["fused"]:
            with pytest.raises(UserError, match="fused=True was given"):
                optimizer.step()
        else:
            optimizer.step()
        names.append(name)
    assert names[0] == benchmark.BASELINE
    assert set(benchmark.BYTES_PER_VALUE) <= set(names)


def test_compared_functions_run_equally_often_and_interleaved(harness: ModuleType) -> None:
    calls: list[str] = []
    timings = harness.compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, warmup=2, repeats=5)
    assert len(calls) == 14
    assert all({*calls[i : i + 2]} == {"a", "b"} for i in range(0, 14, 2))
    assert all(len(timing.seconds) == 5 and min(timing.seconds) > 0 for timing in timings.values())


def test_the_ratio_is_of_the_medians_and_its_quartiles_of_the_rounds(harness: ModuleType) -> None:
    slow, fast = harness.Timing((2.0, 6.0, 40.0)), harness.Timing((1.0, 2.0, 4.0))
    assert harness.ratio(slow, fast) == {
        "ratio": 3.0,
        "ratio_of_minima": 2.0,
        "ratio_quartile1": 2.5,
        "ratio_quartile3": 6.5,
    }


def test_a_record_names_versions_commit_and_hardware(harness: ModuleType, tmp_path: Path) -> None:
    timing = harness.Timing((1.0, 2.0, 3.0, 4.0, 5.0))
    values = harness.record("b", "case", timing, parameters={"n": 3}, baseline=("case", timing), packages=["pytest"])
    assert [values[key] for key in ("median_s", "quartile1_s", "quartile3_s", "min_s")] == [3, 2, 4, 1]
    assert values["ratio"] == 1
    assert {"torch", "pytest", "git_commit", "cpu", "cores", "torch_threads"} <= values["environment"].keys()
    harness.write_lines(tmp_path / "deep" / "lines.jsonl", [values, values])
    assert len((tmp_path / "deep" / "lines.jsonl").read_text().splitlines()) == 2
    assert "1.00 x case" in harness.table([values])
