"""The optimizer benchmark: tensor shapes and cases."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megabatch.errors import UserError

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
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
