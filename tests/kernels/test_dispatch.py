"""Selection of the implementation; Triton is imported only when a kernel runs."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from limits import HANG_S

from megabatch.errors import UserError
from megabatch.kernels import dispatch
from megabatch.kernels.norm.batch_norm import fused_bn_act

BLOCKED = """
import sys
sys.modules["triton"] = None  # an import of it raises ImportError
import torch
import importlib, pkgutil, megabatch
for module in pkgutil.walk_packages(megabatch.__path__, "megabatch."):
    if not module.name.endswith(("_triton", "__main__", "_native")):
        importlib.import_module(module.name)
from megabatch.kernels import dispatch
from megabatch.kernels.loss import fused_cross_entropy_sum
from megabatch.kernels.norm.batch_norm import fused_bn_act
dispatch.has_triton.cache_clear()
sys.modules.pop("triton")
sys.meta_path.insert(0, type("No", (), {"find_spec": staticmethod(
    lambda name, path=None, target=None: (_ for _ in ()).throw(ImportError(name)) if name.startswith("triton") else None
)}))
dispatch.importlib.util.find_spec = lambda name: None
x = torch.randn(4, 3, 2, 2, requires_grad=True)
fused_bn_act(x, torch.ones(3), torch.zeros(3), span=2)[0].sum().backward()
fused_cross_entropy_sum(torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1])).backward()
from megabatch import LARS
optimizer = LARS([x], lr=0.1)
optimizer.step()
assert not any(name.split(".")[0] == "triton" for name in sys.modules), "Triton was imported"
"""


@pytest.mark.slow
def test_every_module_imports_and_every_function_runs_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stderr


def test_a_cpu_tensor_uses_the_reference_unless_the_backend_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_backend_that_cannot_run_raises_an_error_that_names_it(
    backend: Any, has_triton: bool, interprets: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: has_triton)
    monkeypatch.setattr(dispatch, "interprets", lambda: interprets)
    with pytest.raises(UserError, match=message):
        fused_bn_act(torch.ones(1, 1, 1, 1), torch.ones(1), torch.ones(1), span=1, backend=backend)
