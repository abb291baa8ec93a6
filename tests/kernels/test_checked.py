"""A kernel on a GPU is compared once with torch's operations, and not used where it fails or differs."""

from collections.abc import Callable, Iterator

import pytest
import torch
from stand_in_gpu import CUDA, StandInGpu
from torch import Tensor

from megabatch.kernels import checked as module
from megabatch.kernels.checked import checked

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_is_right", {})
    with StandInGpu():
        yield


def runs(kernel: Callable[[], Tensor], times: int = 2) -> tuple[list[float], list[str]]:
    """Results of calls, and which of both functions ran."""
    ran: list[str] = []

    def noted(name: str, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: ran.append(name) or function()  # type: ignore[func-returns-value]

    def plain() -> Tensor:
        return torch.ones(4, device=CUDA)

    like = torch.ones(4, device=CUDA)
    found = [checked("sum", (4,), like, noted("kernel", kernel), noted("plain", plain)) for _ in range(times)]
    return [float(t[0].cpu()) for t in found], ran


def test_a_kernel_that_agrees_is_compared_once_and_used() -> None:
    assert runs(lambda: torch.full((4,), 1.001, device=CUDA)) == (
        [pytest.approx(1.001)] * 2,
        ["plain", "kernel", "kernel"],
    )


def test_a_kernel_that_differs_is_not_used_and_named() -> None:
    with pytest.warns(UserWarning, match=r"the kernel sum \(4,\) in torch.float32 differs .* by 1 of the result"):
        assert runs(lambda: torch.full((4,), 2.0, device=CUDA)) == ([1.0, 1.0], ["plain", "kernel", "plain"])


def test_a_kernel_that_fails_is_not_used_and_named() -> None:
    def fails() -> Tensor:
        raise RuntimeError("out of shared memory")

    with pytest.warns(UserWarning, match="out of shared memory"):
        assert runs(fails) == ([1.0, 1.0], ["plain", "kernel", "plain"])


def test_a_kernel_that_was_not_compared_is_not_used_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert runs(lambda: torch.full((4,), 1.001, device=CUDA))[1] == ["plain", "plain"]
    assert not module._is_right


def test_nothing_is_compared_on_a_cpu() -> None:
    assert checked("sum", (1,), torch.ones(1), lambda: torch.zeros(1), lambda: pytest.fail("ran")) == 0
