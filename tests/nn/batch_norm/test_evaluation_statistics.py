"""Evaluation statistics: each kind against its definition, for several numbers of workers."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes, run_threads
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from megabatch.errors import UserError
from megabatch.nn.batch_norm.evaluation_statistics import (
    EvalStats,
    begin_precise,
    collect_statistics,
    discard_step,
    finish_precise,
    finish_step,
)
from megabatch.nn.batch_norm.groups import new_span_group
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d

EXACT = {"rtol": 1e-12, "atol": 1e-13}
KINDS: list[EvalStats] = ["running", "running_all_reduced", "last_batch", "precise"]
SPAN, CHANNELS, MOMENTUM = 4, 3, 0.1


def step_images(step: int, count: int = 24) -> Tensor:
    stream = torch.Generator().manual_seed(step)
    return torch.randn(count, CHANNELS, 3, 3, generator=stream, dtype=torch.float64) * (1 + step) + step


def layer_with(group_size: int = 1) -> SpanBatchNorm2d:
    group = new_span_group(group_size)
    return SpanBatchNorm2d(
        CHANNELS, span=SPAN, stats_momentum=MOMENTUM, process_group=group, group_size=group_size
    ).double()


def statistics(x: Tensor) -> Tensor:
    """Mean and unbiased variance of each span, (spans, 2, C)."""
    return torch.stack([torch.stack([s.mean((0, 2, 3)), s.var((0, 2, 3), correction=1)]) for s in x.split(SPAN)])


def expected(kind: EvalStats, num_steps: int, count: int = 24) -> Tensor:
    running = torch.stack([torch.zeros(CHANNELS), torch.ones(CHANNELS)]).double()
    for step in range(num_steps):
        spans = statistics(step_images(step, count))
        sizes = torch.tensor([len(s) for s in step_images(step, count).split(SPAN)], dtype=torch.float64)
        new = spans[0] if kind == "running" else torch.einsum("s,skc->kc", sizes / count, spans)
        momentum = 1.0 if kind == "last_batch" else MOMENTUM
        running = (1 - momentum) * running + momentum * new
    return running


def train(kind: EvalStats, num_steps: int, micro_batch: int, group_size: int = 1, count: int = 24) -> Tensor:
    """Running statistics after steps of `count` samples, distributed over ranks and micro-batches, spans in order."""
    layer = layer_with(group_size)
    collect_statistics(layer, True)
    num_groups = dist.get_world_size() // group_size
    number, member = divmod(dist.get_rank(), group_size)
    for step in range(num_steps):
        spans = step_images(step, count).split(SPAN)
        share = -(-len(spans) // num_groups)
        mine = spans[number * share : (number + 1) * share]
        if group_size > 1:
            parts = [torch.tensor_split(span, group_size)[member] for span in mine]
        else:
            parts = list(torch.cat(mine).split(micro_batch)) if mine else []
        for part in parts:
            layer(part)
        finish_step(layer, eval_stats=kind)
    assert layer.num_batches_tracked == num_steps
    return torch.stack([layer.running_mean, layer.running_var])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("world_size", "micro_batch", "group_size"),
    [(1, 4, 1), (1, 24, 1), (1, 8, 1), (2, 4, 1), (3, 8, 1), (2, 4, 2), (4, 4, 2), (5, 4, 1)],
)
def test_running_statistics_depend_on_spans_and_not_on_workers_or_micro_batches(
    kind: EvalStats, world_size: int, micro_batch: int, group_size: int
) -> None:
    ranks = run_threads(world_size, train, kind, 3, micro_batch, group_size)
    for running in ranks:
        torch.testing.assert_close(running, expected(kind, 3), **EXACT)
        assert torch.equal(running, ranks[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [18, 3])
@pytest.mark.parametrize("group_size", [1, 2])
def test_a_short_last_span_counts_by_its_number_of_samples(kind: EvalStats, count: int, group_size: int) -> None:
    for running in run_threads(2, train, kind, 2, 8, group_size, count):
        torch.testing.assert_close(running, expected(kind, 2, count), **EXACT)


def ddp_averages(kind: EvalStats) -> tuple[Tensor, Tensor]:
    """Averages of two steps of two micro-batches under DistributedDataParallel's defaults, and the exact ones."""
    model = DistributedDataParallel(nn.Sequential(layer_with(), nn.Conv2d(CHANNELS, 2, 1).double()))
    collect_statistics(model)
    for step in range(2):
        images = step_images(step).tensor_split(dist.get_world_size())[dist.get_rank()]
        for part in images.split(8):
            model(part).sum().backward()
        finish_step(model, eval_stats=kind)
    layer = model.module[0]
    return torch.stack([layer.running_mean, layer.running_var]), expected(kind, 2)


@pytest.mark.parametrize("kind", ["running", "running_all_reduced"])
def test_ddp_with_its_defaults_leaves_the_statistics_of_a_step_alone(kind: EvalStats) -> None:
    for running, exact in run_processes(2, ddp_averages, kind):
        torch.testing.assert_close(running, exact, **EXACT)


@pytest.mark.parametrize("convert_layer", [nn.Module.float, nn.Module.double, lambda layer: layer.to("meta")])
def test_the_statistics_of_a_step_follow_the_layer(convert_layer: Callable[[nn.Module], nn.Module]) -> None:
    layer = layer_with()
    convert_layer(layer)
    for values in (layer.span_sum, layer.first_span):
        assert (values.dtype, values.device) == (layer.running_var.dtype, layer.running_var.device)
    assert {name for name, _ in layer.named_buffers()} == {name for name, _ in nn.BatchNorm2d(3).named_buffers()}


def test_finish_step_gives_the_same_without_torch_distributed() -> None:
    layer = layer_with()
    collect_statistics(layer, True)
    layer(step_images(0))
    finish_step(layer, eval_stats="running_all_reduced")
    running = torch.stack([layer.running_mean, layer.running_var])
    torch.testing.assert_close(running, expected("running_all_reduced", 1), **EXACT)


def own_averages() -> tuple[Tensor, Tensor]:
    """Mean over workers of each worker's own running average, and the average of `running_all_reduced`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    alone, together = layer_with(), layer_with()
    collect_statistics(together, True)
    for step in range(5):
        part = torch.tensor_split(step_images(step), size)[rank]
        alone(part)
        together(part)
        finish_step(together, eval_stats="running_all_reduced")
    mean = torch.stack([alone.running_mean, alone.running_var]) / size
    dist.all_reduce(mean)
    return mean, torch.stack([together.running_mean, together.running_var])


def test_all_reducing_before_evaluation_equals_averaging_each_workers_running_average() -> None:
    for mean_of_averages, kept in run_threads(3, own_averages):
        torch.testing.assert_close(kept, mean_of_averages, **EXACT)


def test_a_whole_model_sends_one_message_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[int] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, **_: messages.append(tensor.numel()))

    def step() -> None:
        model = nn.Sequential(SpanBatchNorm2d(3, span=2), nn.Conv2d(3, 5, 1), SpanBatchNorm2d(5, span=2))
        collect_statistics(model, True)
        model(torch.randn(4, 3, 2, 2))
        finish_step(model, eval_stats="running_all_reduced")

    run_threads(1, step)
    assert messages == [2 * 3 + 1 + 2 * 5 + 1]


def test_a_discarded_step_leaves_no_trace() -> None:
    layer = layer_with()
    collect_statistics(layer, True)
    layer(torch.full((4, CHANNELS, 2, 2), float("nan"), dtype=torch.float64))
    discard_step(layer)
    layer(step_images(0))
    finish_step(layer, eval_stats="running")
    torch.testing.assert_close(layer.running_var, expected("running", 1)[1], **EXACT)


def test_a_step_in_which_a_layer_saw_nothing_keeps_its_averages() -> None:
    layer = layer_with()
    collect_statistics(layer, True)
    layer(step_images(0))
    finish_step(layer, eval_stats="running_all_reduced")
    before = layer.running_mean.clone()
    finish_step(layer, eval_stats="last_batch")
    assert torch.equal(layer.running_mean, before)


def recompute(num_batches: int, group_size: int) -> Tensor:
    layer = layer_with(group_size)
    model = nn.Sequential(layer, nn.Dropout(0.5))
    begin_precise(model)
    number, member = divmod(dist.get_rank(), group_size)
    num_groups = dist.get_world_size() // group_size
    with torch.no_grad():
        for batch in range(num_batches):
            for span in torch.tensor_split(step_images(batch, 18), num_groups)[number].split(SPAN):
                part = torch.tensor_split(span, group_size)[member]
                output = model(part)
                assert bool((output != 0).all())  # dropout is off
    finish_precise(model)
    assert not layer.training
    assert layer.num_batches_tracked == 0
    return torch.stack([layer.running_mean, layer.running_var])


@pytest.mark.parametrize(("world_size", "group_size"), [(1, 1), (2, 1), (3, 1), (2, 2), (4, 2)])
def test_precise_statistics_are_those_of_all_samples_together(world_size: int, group_size: int) -> None:
    population = torch.cat([step_images(batch, 18) for batch in range(3)])
    exact = torch.stack([population.mean((0, 2, 3)), population.var((0, 2, 3), correction=1)])
    for running in run_threads(world_size, recompute, 3, group_size):
        torch.testing.assert_close(running, exact, **EXACT)


def test_precise_statistics_in_float32_survive_a_large_mean() -> None:
    x = (step_images(0) + 1000).float()
    layer = SpanBatchNorm2d(CHANNELS, span=SPAN)
    begin_precise(layer)
    layer(x)
    finish_precise(layer)
    exact = x.double().var((0, 2, 3), correction=1)
    torch.testing.assert_close(layer.running_var.double(), exact, rtol=1e-5, atol=0)


def test_forwards_between_begin_and_finish_precise_normalise_by_their_own_span() -> None:
    layer = layer_with()
    begin_precise(layer)
    output = layer(step_images(2, 8))
    torch.testing.assert_close(output[:4].mean((0, 2, 3)), torch.zeros(CHANNELS).double(), rtol=0, atol=1e-12)


def test_precise_without_begin_or_without_samples_is_refused() -> None:
    layer = layer_with()
    with pytest.raises(UserError, match="begin_precise"):
        finish_precise(layer)
    begin_precise(layer)
    with pytest.raises(UserError, match="one batch works"):
        finish_precise(layer)


def test_an_unknown_kind_is_refused_with_one_that_works() -> None:
    with pytest.raises(UserError, match="eval_stats=running works"):
        finish_step(layer_with(), eval_stats="mean")  # type: ignore[arg-type]


def test_models_without_span_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    before = copy.deepcopy(model.state_dict())
    collect_statistics(model, True)
    finish_step(model, eval_stats="running")
    begin_precise(model)
    finish_precise(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
