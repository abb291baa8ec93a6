"""benchmarks/step.py runs in a fresh clone: cases of packages that cannot be imported are skipped with a reason."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def step_cases(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step_cases

    yield step_cases
    sys.modules.pop("step_cases")


@pytest.mark.parametrize("error", [ImportError("no torchvision"), RuntimeError("operator torchvision::nms is missing")])
def test_a_package_that_cannot_be_imported_is_a_reason_to_skip(step_cases, monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(step_cases.importlib, "import_module", fail)
    assert str(error) in step_cases.missing("torchvision bf16 channels_last", "resnet18")
    assert str(error) in step_cases.missing("timm bf16 channels_last", "resnet18")
    assert step_cases.missing("plain eager fp32", "resnet18") is None
    assert step_cases.missing("megabatch train", "resnet18") is None


@pytest.mark.parametrize("case", ["plain eager fp32", "plain eager fp32 channels_last"])
def test_a_plain_case_takes_a_step_on_the_network_of_torchvision(step_cases, monkeypatch, case):
    monkeypatch.setitem(step_cases.SETTINGS["resnet18"], "batch", 2)
    with step_cases.cases("resnet18")[case]() as (step, net):
        step()
    assert sum(parameter.numel() for parameter in net.parameters()) == 11_173_962  # torchvision's, 10 classes, 3x3 stem
