"""Which implementation runs, and that nothing here needs Triton before a kernel does."""

import subprocess
import sys
from typing import Any

import pytest
import torch

import megabatch.kernels
from megabatch.errors import UserError
from megabatch.kernels import dispatch, fused_bn_act

BLOCKED = """
import sys
sys.modules["triton"] = None  # an import of it raises ImportError
import torch
import megabatch.kernels as kernels
for name in kernels.__all__:
    getattr(kernels, name)
kernels.dispatch.has_triton.cache_clear()
sys.modules.pop("triton")
sys.meta_path.insert(0, type("No", (), {"find_spec": staticmethod(
    lambda name, path=None, target=None: (_ for _ in ()).throw(ImportError(name)) if name.startswith("triton") else None
)}))
kernels.dispatch.importlib.util.find_spec = lambda name: None
x = torch.randn(4, 3, 2, 2, requires_grad=True)
kernels.fused_bn_act(x, torch.ones(3), torch.zeros(3), span=2)[0].sum().backward()
kernels.fused_cross_entropy_sum(torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1])).backward()
from megabatch.optim import LARS
optimizer = LARS([x], lr=0.1)
optimizer.step()
assert not any(name.split(".")[0] == "triton" for name in sys.modules), "Triton was imported"
"""


def test_every_name_imports_and_every_function_runs_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_offered_is_what_can_be_imported() -> None:
    assert sorted(megabatch.kernels.__all__) == sorted(megabatch.kernels._HOMES)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = megabatch.kernels.nothing


def test_a_cpu_tensor_takes_the_reference_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1)
    assert not dispatch.use_triton(x, "auto")
    assert not dispatch.use_triton(x, "reference")
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(dispatch, "interprets", lambda: True)
    assert dispatch.use_triton(x, "triton")


@pytest.mark.parametrize(
    ("backend", "has_triton", "interprets", "message"),
    [
        ("cuda", True, True, "needed auto, triton or reference"),
        ("triton", False, False, "not installed"),
        ("triton", True, False, "TRITON_INTERPRET=1"),
    ],
)
def test_a_backend_that_cannot_run_is_named(
    backend: Any, has_triton: bool, interprets: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: has_triton)
    monkeypatch.setattr(dispatch, "interprets", lambda: interprets)
    with pytest.raises(UserError, match=message):
        fused_bn_act(torch.ones(1, 1, 1, 1), torch.ones(1), torch.ones(1), span=1, backend=backend)
