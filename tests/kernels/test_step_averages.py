"""Running averages of all layers in two launches: equal to those of one layer after another."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stand_in_gpu import CUDA, StandInGpu
from torch import nn

from megabatch.errors import UserError
from megabatch.nn.batch_norm.evaluation_statistics import EvalStats, collect_statistics, finish_step
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d

WIDTHS = (3, 300, 16)
KINDS: list[EvalStats] = ["running", "running_all_reduced", "last_batch"]


def model_of(*, momentum: float = 0.1) -> nn.Sequential:
    layers = [SpanBatchNorm2d(width, span=2, stats_momentum=momentum) for width in WIDTHS]
    model = nn.Sequential(*layers)
    collect_statistics(model)
    return model


def forward(model: nn.Sequential, seed: int) -> None:
    """Three spans of each layer, of which the last is short; the middle layer sees none in the second step."""
    generator = torch.Generator().manual_seed(seed)
    for number, layer in enumerate(model):
        images = torch.randn(5, WIDTHS[number], 2, 2, generator=generator) * (1 + seed) + number
        if (seed, number) != (1, 1):
            layer(images)


def state(model: nn.Sequential) -> Iterator[torch.Tensor]:
    for layer in model:
        yield from (*layer.buffers(), layer.span_sum, layer.first_span)  # type: ignore[misc]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_two_launches_for_all_layers_give_what_one_layer_after_another_gives(kind: EvalStats, momentum: float) -> None:
    one, all_layers = (model_of(momentum=momentum) for _ in range(2))
    for step in range(3):
        for model, backend in ((one, "reference"), (all_layers, "triton")):
            forward(model, step)
            finish_step(model, eval_stats=kind, backend=backend)  # type: ignore[arg-type]
        for expected, found in zip(state(one), state(all_layers), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert all(int(layer.num_batches_tracked) == 3 for layer in all_layers)  # type: ignore[arg-type,operator]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_overflow_discards_the_statistics_of_its_step_alone(backend: Any) -> None:
    model, plain = model_of(), model_of()
    for step, overflow in enumerate((0.0, 1.0, 0.0)):
        forward(model, step)
        if overflow:
            for layer in model:
                layer.span_sum.fill_(torch.nan)  # type: ignore[union-attr,operator]
        else:
            forward(plain, step)
            finish_step(plain, eval_stats="running_all_reduced", backend=backend)
        finish_step(model, eval_stats="running_all_reduced", backend=backend, overflow=torch.tensor(overflow))
    assert all(map(torch.equal, state(model), state(plain)))


@pytest.mark.usefixtures("interpreter")
def test_averages_whose_tensors_were_replaced_are_found_anew() -> None:
    model = model_of()
    forward(model, 0)
    finish_step(model, eval_stats="last_batch", backend="triton")
    twin = copy.deepcopy(model)
    model.load_state_dict({name: 0 * value for name, value in model.state_dict().items()}, assign=True)
    for net in (model, twin):
        forward(net, 2)
        finish_step(net, eval_stats="last_batch", backend="triton")
    for layer, other in zip(model, twin, strict=True):
        assert torch.equal(layer.running_mean, other.running_mean)  # type: ignore[arg-type]
        assert layer.running_mean.any()  # type: ignore[operator,union-attr]


class Counting(StandInGpu):
    """Counts what is sent to the device: Triton's launches and torch's operations that are no views."""

    def __init__(self) -> None:
        super().__init__(launch=lambda kernel, *_: self.sent.append(kernel))
        self.sent: list[str] = []

    def run(self, func: Any, *args: Any) -> Any:
        if not func.is_view:
            self.sent.append(str(func))
        return super().run(func, *args)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_sends_two_kernels_to_the_gpu_whatever_the_number_of_layers(kind: EvalStats) -> None:
    pytest.importorskip("triton")
    with Counting() as gpu:
        model = model_of().to(CUDA)
        finish_step(model, eval_stats=kind)  # the first step also sends the addresses
        gpu.sent.clear()
        finish_step(model, eval_stats=kind)
        assert gpu.sent == ["aten.new_empty.default", "take_sums_kernel", "move_averages_kernel"]


def test_a_capture_of_layers_that_no_step_has_updated_is_refused() -> None:
    pytest.importorskip("triton")
    with StandInGpu():
        model = model_of().to(CUDA)
        with pytest.raises(UserError, match="outside of capture first works"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            finish_step(model, eval_stats="running")


def test_layers_of_several_momenta_are_updated_one_after_another() -> None:
    pytest.importorskip("triton")
    with Counting() as gpu:
        model = model_of().to(CUDA)
        model[0].momentum = 0.5  # type: ignore[union-attr]
        finish_step(model, eval_stats="running")
        assert "take_sums_kernel" not in gpu.sent
        assert all(int(layer.num_batches_tracked) == 1 for layer in model)  # type: ignore[arg-type,operator]
