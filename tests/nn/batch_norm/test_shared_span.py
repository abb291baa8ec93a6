"""Spans shared by a group of ranks against nn.BatchNorm2d on the gathered batch; float64 unless noted."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_processes, run_threads
from torch import Tensor, nn

from megabatch.errors import UserError
from megabatch.nn.batch_norm import shared_span
from megabatch.nn.batch_norm.groups import new_span_group
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.initialize import initialize
from megabatch.nn.small import resnet8

EXACT = {"rtol": 1e-11, "atol": 1e-12}
CHANNELS = 3


def images(count: int, *, offset: float = 0.5, seed: int = 0, size: int = 3) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(count, CHANNELS, size, size, generator=stream, dtype=torch.float64) * 2 + offset


def set_weights(layer: nn.Module) -> None:
    stream = torch.Generator().manual_seed(5)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=stream)


def loss_of(output: Tensor, start: int) -> Tensor:
    """Sum over samples in which every output has another weight, by its position in the gathered batch."""
    slope = torch.randn((64, *output.shape[1:]), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    slope = slope[start : start + len(output)].to(output.dtype)
    return (output * slope + output.square() * slope.abs()).sum()


def share(counts: list[int], affine: bool, channels_last: bool) -> dict[str, Tensor]:
    """Samples of this rank: counts[rank] consecutive samples of the batch."""
    rank = dist.get_rank()
    group = new_span_group(len(counts))
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    layer = SpanBatchNorm2d(CHANNELS, span=64, process_group=group, group_size=len(counts), affine=affine).double()
    set_weights(layer)
    start = sum(counts[:rank])
    x = images(sum(counts))[start : start + counts[rank]].to(memory_format=memory_format).requires_grad_()
    output = layer(x)
    loss_of(output, start).backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    keeps_format = output.is_contiguous(memory_format=memory_format) and x.grad.is_contiguous(
        memory_format=memory_format
    )
    return {
        "output": output.detach(),
        "input_grad": x.grad,
        "keeps_format": torch.tensor(keeps_format),
        "mean": layer.running_mean,
        "variance": layer.running_var,
        **gradients,
    }


def gathered(counts: list[int], affine: bool) -> dict[str, Tensor]:
    layer = nn.BatchNorm2d(CHANNELS, affine=affine).double()
    set_weights(layer)
    x = images(sum(counts)).requires_grad_()
    output = layer(x)
    loss_of(output, 0).backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {
        "output": output.detach(),
        "input_grad": x.grad,
        "mean": layer.running_mean,
        "variance": layer.running_var,
        **gradients,
    }


def assert_is_gathered(ranks: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    for name in ("output", "input_grad"):
        torch.testing.assert_close(torch.cat([rank[name] for rank in ranks]), expected[name], **EXACT)
    for name in ("weight", "bias"):
        if name in expected:  # a rank holds the gradient of its own samples; the trainer sums
            torch.testing.assert_close(sum(rank[name] for rank in ranks), expected[name], **EXACT)
    for name in ("mean", "variance"):
        torch.testing.assert_close(ranks[0][name], expected[name], **EXACT)
        assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks)


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=2, max_size=6).filter(lambda counts: sum(counts) > 0),
    affine=st.booleans(),
    channels_last=st.booleans(),
)
def test_a_group_with_unequal_and_empty_shares_is_batch_norm_on_the_gathered_batch(
    counts: list[int], affine: bool, channels_last: bool
) -> None:
    ranks = run_threads(len(counts), share, counts, affine, channels_last)
    assert_is_gathered(ranks, gathered(counts, affine))
    assert all(rank["keeps_format"] for rank in ranks)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_same_holds_between_real_processes() -> None:
    counts = [4, 0, 3]
    ranks = run_processes(3, share, counts, True, True)
    assert_is_gathered(ranks, gathered(counts, affine=True))


def deviations(ratio: float) -> Tensor:
    group = new_span_group(4)
    layer = SpanBatchNorm2d(CHANNELS, span=64, stats_momentum=1.0, process_group=group, group_size=4)
    x = images(32, offset=2 * ratio, size=8).float()
    layer(x[dist.get_rank() * 8 :][:8])
    return layer.running_var.double() / x.double().var((0, 2, 3), correction=1)


@settings(max_examples=10, deadline=None)
@given(ratio=st.floats(10, 2000))
def test_a_mean_of_a_thousand_deviations_keeps_its_variance_in_float32(ratio: float) -> None:
    for relative in run_threads(4, deviations, ratio):
        torch.testing.assert_close(relative, torch.ones(CHANNELS).double(), rtol=1e-3, atol=0)


def test_the_variance_between_ranks_counts() -> None:
    """Averaging variances would give 0 here: samples are constant on each rank and differ only between ranks."""

    def variance() -> float:
        layer = SpanBatchNorm2d(1, span=8, stats_momentum=1.0, process_group=new_span_group(2), group_size=2)
        layer(torch.full((2, 1, 1, 1), float(dist.get_rank())))
        return layer.running_var.item()

    assert run_threads(2, variance) == pytest.approx([1 / 3] * 2)  # of 0, 0, 1, 1, unbiased


def count_collectives() -> list[tuple[str, int]]:
    calls: list[tuple[str, int]] = []
    gather, reduce = shared_span._all_gather, dist.all_reduce

    def counted_gather(output: Tensor, input: Tensor, **options: object) -> None:
        calls.append(("gather", input.numel()))
        gather(output, input, **options)

    def counted_reduce(tensor: Tensor, **options: object) -> None:
        calls.append(("reduce", tensor.numel()))
        reduce(tensor, **options)

    layer = SpanBatchNorm2d(CHANNELS, span=8, process_group=new_span_group(2), group_size=2)
    shared_span._all_gather, dist.all_reduce = counted_gather, counted_reduce
    layer(torch.randn(4, CHANNELS, 2, 2, requires_grad=True)).square().sum().backward()
    return calls


@pytest.mark.multiprocess
def test_a_layer_sends_one_message_forward_and_one_backward() -> None:
    assert run_processes(2, count_collectives) == [[("gather", 2 * CHANNELS + 1), ("reduce", 2 * CHANNELS)]] * 2


def mixed_precision() -> tuple[torch.dtype, torch.dtype, torch.dtype, Tensor]:
    layer = SpanBatchNorm2d(CHANNELS, span=16, stats_momentum=1.0, process_group=new_span_group(2), group_size=2)
    start = 8 * dist.get_rank()
    x = images(16, offset=3.0).bfloat16()[start : start + 8].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    loss_of(output, start).backward()
    return output.dtype, x.grad.dtype, layer.weight.grad.dtype, torch.stack([layer.running_mean, layer.running_var])


def test_autocast_normalises_bfloat16_by_float32_statistics() -> None:
    x = images(16, offset=3.0).bfloat16().double()
    exact = torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3), correction=1)])
    for output, gradient, weight_gradient, statistics in run_threads(2, mixed_precision):
        assert output == gradient == torch.bfloat16
        assert weight_gradient == statistics.dtype == torch.float32
        torch.testing.assert_close(statistics.double(), exact, rtol=1e-5, atol=1e-5)


def train_net(counts: list[int], compiled: bool) -> list[Tensor]:
    """Gradients, summed over ranks, of a whole net whose layers share spans."""
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # comes from dynamo
    size = len(counts)
    group = new_span_group(size)

    def norm(channels: int) -> nn.Module:
        if size == 1:
            return nn.BatchNorm2d(channels)
        return SpanBatchNorm2d(channels, span=64, process_group=group, group_size=size)

    model = resnet8(num_classes=4, in_channels=CHANNELS, width=4, norm=norm).double()
    initialize(model, "he_fan_out", seed=1, zero_gamma=False)
    rank = dist.get_rank()
    start = sum(counts[:rank])
    x = images(sum(counts), size=8)[start : start + counts[rank]]
    forward = torch.compile(model, backend="eager") if compiled else model
    loss_of(forward(x), start).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return gradients


def test_a_whole_net_on_three_ranks_has_the_gradients_of_one() -> None:
    (expected,) = run_threads(1, train_net, [9], False)
    for gradients in run_threads(3, train_net, [5, 0, 4], False):
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_compiled_net_breaks_its_graph_at_the_collective_and_gives_the_same() -> None:
    (expected,) = run_threads(1, train_net, [6], False)
    for gradients in run_processes(2, train_net, [2, 4], True):
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_more_local_samples_than_the_shared_span_are_refused() -> None:
    def forward() -> None:
        layer = SpanBatchNorm2d(CHANNELS, span=4, process_group=new_span_group(2), group_size=2)
        with pytest.raises(UserError, match="a micro-batch of 2 works"):
            layer(torch.randn(5, CHANNELS, 2, 2))

    run_threads(2, forward)


def test_a_process_group_of_another_size_than_group_size_is_refused() -> None:
    def make() -> None:
        with pytest.raises(UserError, match="group_size=4 works"):
            SpanBatchNorm2d(CHANNELS, span=4, process_group=dist.new_group([0, 1, 2, 3]), group_size=2)

    run_threads(4, make)


def test_evaluation_and_its_copy_need_no_other_rank() -> None:
    def evaluate() -> Tensor:
        layer = SpanBatchNorm2d(CHANNELS, span=8, process_group=new_span_group(2), group_size=2).double()
        layer(images(4))
        return copy.deepcopy(layer).eval()(images(3)) if dist.get_rank() == 0 else torch.zeros(())

    output = run_threads(2, evaluate)[0]
    assert output.shape == (3, CHANNELS, 3, 3)
