"""A kernel on a GPU is compared once with torch's operations, and not used where it fails or differs."""

import math
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
    monkeypatch.setattr(module, "_is_complete", False)
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


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_zeros_and_a_diverged_run_say_nothing_about_a_kernel(value: float) -> None:
    like = torch.ones(4, device=CUDA)
    assert checked("sum", (4,), like, lambda: pytest.fail("ran"), lambda: like * value) is not None
    assert not module._is_right


@pytest.mark.parametrize("others", [[True, False], [True, True], [True]])
def test_ranks_use_a_kernel_that_all_of_them_found_right_and_no_other(others: list[bool]) -> None:
    seen: list[module.Verdicts] = []

    def gather(verdicts: module.Verdicts) -> list[module.Verdicts]:
        seen.append(dict(verdicts))
        (key,) = verdicts
        return [verdicts, *({key: right} for right in others)] if len(others) > 1 else [verdicts, {}]

    with module.agreed(gather):
        _, ran = runs(lambda: torch.full((4,), 1.001, device=CUDA), times=1)
    assert (list(seen[0].values()), ran) == ([True], ["plain", "kernel"])
    is_used = others == [True, True]
    assert runs(lambda: torch.full((4,), 1.001, device=CUDA), times=1)[1] == ["kernel" if is_used else "plain"]
    late = checked("other", (4,), torch.ones(4, device=CUDA), lambda: pytest.fail("ran"), lambda: torch.ones(1))
    assert late.tolist() == [1.0]  # each rank would judge for itself


def test_nothing_is_compared_on_a_cpu() -> None:
    assert checked("sum", (1,), torch.ones(1), lambda: torch.zeros(1), lambda: pytest.fail("ran")) == 0
