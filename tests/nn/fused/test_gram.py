"""Bottlenecks in the Gram form: outputs, gradients and statistics are those of plain blocks, also in shared spans."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from norm_cases import error, step_sums
from ranks import run_threads
from torch import Tensor, nn

from megabatch.nn.batch_norm.evaluation_statistics import collect_statistics, finish_step, span_layers
from megabatch.nn.batch_norm.groups import new_span_group
from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.fused import gram
from megabatch.nn.fused.fuse import set_fusion
from megabatch.nn.initialize import last_norms
from megabatch.nn.resnet import Bottleneck, ResNet

COUNT = 6
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch norm": nn.BatchNorm2d,
    "two spans, one short": functools.partial(SpanBatchNorm2d, span=4),
}
CHANNELS = [256, 256, 512, 512]
"""Of the norms of each block's shortcut and branch."""


@pytest.fixture(autouse=True)
def any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "ROWS_PER_CHANNEL", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Output channels of each convolution in the Gram form."""
    seen: list[int] = []
    function = gram.gram_conv1x1_norm

    def counted(x: Tensor, weight: Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(len(weight))
        return function(x, weight, *arguments, **options)

    monkeypatch.setattr(gram, "gram_conv1x1_norm", counted)
    return seen


def net(norm: Callable[[int], nn.Module], *, gamma: float | None = None, **options: Any) -> nn.Module:
    """The first two stages of a ResNet, of one block each."""
    torch.manual_seed(0)
    model = ResNet(Bottleneck, (1, 1, 1, 1), num_classes=10, norm=norm, **options)
    model.layer3, model.layer4, model.fc = nn.Sequential(), nn.Sequential(), nn.Linear(512, 10)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    for layer in last_norms(model):
        if gamma is not None:
            nn.init.constant_(layer.weight, gamma)
    return model.to(memory_format=torch.channels_last)


def step(model: nn.Module, *, rank: slice = slice(COUNT)) -> dict[str, Tensor]:
    """Logits, gradients and statistics of one step."""
    images = torch.randn(COUNT, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    slope = torch.randn(COUNT, 10, generator=torch.Generator().manual_seed(2))
    logits = model(images.to(next(model.parameters()).dtype).contiguous(memory_format=torch.channels_last)[rank])
    (logits * slope.to(logits.dtype)[rank]).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | gradients | dict(model.named_buffers()) | step_sums(model)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal up to rounding, and to the few values at which rounding changes the choice of a ReLU or a maximum."""
    assert found.keys() == expected.keys()
    errors = {name: error(found[name], values.double()) for name, values in expected.items()}
    assert max(errors.values()) < 2e-2, errors
    assert sorted(errors.values())[len(errors) // 2] < 1e-5, errors


@pytest.mark.parametrize(
    ("norm", "collects", "gamma"),
    [("batch norm", False, None), ("two spans, one short", False, 0.0), ("two spans, one short", True, None)],
)
def test_a_step_is_that_of_the_plain_model(calls: list[int], norm: str, collects: bool, gamma: float | None) -> None:
    plain = net(NORMS[norm], gamma=gamma)
    collect_statistics(plain, collects)
    model = copy.deepcopy(plain)
    set_fusion(model, "reference")
    assert_equal(step(model), step(plain))
    assert calls == CHANNELS


def test_bfloat16_autocast_gives_float32_gradients_near_the_plain_ones(calls: list[int]) -> None:
    plain = net(nn.BatchNorm2d)
    exact = step(copy.deepcopy(plain).double())
    results = []
    for fusion in ("plain", "reference"):
        model = copy.deepcopy(plain)
        set_fusion(model, fusion)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(model))
    assert calls == CHANNELS
    theirs, mine = (
        sum(float((r[name].double() - t).norm() / t.norm()) for name, t in exact.items() if "conv" in name)
        for r in results
    )
    assert mine < 1.1 * theirs
    assert results[1]["layer1.0.conv3.weight"].dtype == torch.float32


def test_layers_that_the_equations_do_not_cover_run_as_convolution_and_norm(calls: list[int]) -> None:
    plain = net(nn.BatchNorm2d, blur_pool=True)
    plain.layer1[0].bn3.register_forward_hook(lambda *_: None)
    model = copy.deepcopy(plain)
    set_fusion(model, "reference")
    assert_equal(step(model), step(plain))
    assert calls == [256, 512]  # layer1's shortcut and layer2's branch; layer2's shortcut is blurred
    calls.clear()
    model.layer1[0].downsample[0].register_forward_hook(lambda *_: None)
    model.layer2[0].bn3 = nn.GroupNorm(32, 512)
    step(model)
    model.eval()(torch.randn(2, 3, 32, 32))
    assert not calls


def test_spans_of_few_rows_run_as_convolution_and_norm(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows per channel are 6 x 64 / 64 in the first stage, 6 x 16 / 256 in the shortcut of the second."""
    model = net(nn.BatchNorm2d)
    set_fusion(model, "reference")
    for limit, expected in ((6, [256, 256]), (7, []), (0.3, [256, 256, 512, 512])):
        monkeypatch.setattr(gram, "ROWS_PER_CHANNEL", limit)
        calls.clear()
        step(model)
        assert calls == expected


def shared_step(plain: nn.Module, counts: list[int], fusion: Any, collects: bool) -> dict[str, Tensor]:
    """Statistics on one rank, and gradients summed over ranks, of a step in spans that all ranks share."""
    size, rank = len(counts), dist.get_rank()
    model, group = copy.deepcopy(plain), new_span_group(size)
    for layer in span_layers(model):
        layer.process_group, layer.group_size = group, size
    set_fusion(model, fusion)
    collect_statistics(model, collects)
    start = sum(counts[:rank])
    step(model, rank=slice(start, start + counts[rank]))
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    if collects:
        finish_step(model, eval_stats="running_all_reduced")
    return {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())


@pytest.mark.parametrize("collects", [False, True])
def test_ranks_that_share_spans_train_as_one(calls: list[int], collects: bool) -> None:
    plain = net(functools.partial(SpanBatchNorm2d, span=16))
    (expected,) = run_threads(1, shared_step, plain, [COUNT], "plain", collects)
    assert not calls
    for found in run_threads(2, shared_step, plain, [4, 2], "reference", collects):
        assert_equal(found, expected)
    assert sorted(calls) == sorted(2 * CHANNELS)


def test_a_rank_without_samples_takes_part(calls: list[int]) -> None:
    plain = net(functools.partial(SpanBatchNorm2d, span=16))
    (expected,) = run_threads(1, shared_step, plain, [COUNT], "plain", False)
    for found in run_threads(3, shared_step, plain, [4, 0, 2], "reference", False):
        assert_equal(found, expected)
    assert sorted(calls) == sorted(3 * CHANNELS)
