"""Chains of fused bottlenecks: which layers run as one operation, and that hooks, norms and spans are kept."""

import copy
import functools
from typing import Any

import pytest
import torch
from norm_cases import step_sums
from torch import Tensor, nn

from megabatch.nn.batch_norm.layer import SpanBatchNorm2d
from megabatch.nn.fused import gram
from megabatch.nn.fused.bottleneck import run_blocks
from megabatch.nn.fused.fuse import set_fusion
from megabatch.nn.resnet import Bottleneck

SPAN = 2


def blocks(seed: int = 0) -> nn.ModuleList:
    """A block with a shortcut, and the block that follows it."""
    torch.manual_seed(seed)
    norm = functools.partial(SpanBatchNorm2d, span=SPAN)
    chain = nn.ModuleList([Bottleneck(8, 4, 2, norm=norm), Bottleneck(16, 4, 1, norm=norm)])
    for layer in chain.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return chain


def fused(plain: nn.ModuleList) -> nn.ModuleList:
    copied = copy.deepcopy(plain)
    set_fusion(copied, "reference")
    return copied


def step(chain: nn.ModuleList) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the parameters' gradients of a fixed function of it."""
    x = torch.randn(5, 8, 6, 6, generator=torch.Generator().manual_seed(1))
    y = run_blocks(chain, x)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return y.detach(), {name: p.grad for name, p in chain.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Output channels of each convolution in the Gram form, and if it includes the next convolution."""
    seen: list[tuple[int, bool]] = []
    function = gram.gram_conv1x1_norm

    def counted(x: Tensor, weight: Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append((len(weight), options["next_weight"] is not None))
        return function(x, weight, *arguments, **options)

    monkeypatch.setattr(gram, "ROWS_PER_CHANNEL", 0)
    monkeypatch.setattr(gram, "gram_conv1x1_norm", counted)
    return seen


def assert_same(one: nn.ModuleList, other: nn.ModuleList) -> None:
    (y, gradients), (expected, expected_gradients) = step(one), step(other)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4)
    statistics, expected_statistics = (dict(blocks.named_buffers()) | step_sums(blocks) for blocks in (one, other))
    for name, values in statistics.items():
        torch.testing.assert_close(values, expected_statistics[name], rtol=1e-4, atol=1e-5, msg=name)


SHORTCUT, BRANCH, CHAINED = (16, False), (16, False), (16, True)


def test_the_last_convolution_includes_the_first_of_the_next_block(calls: list[tuple[int, bool]]) -> None:
    plain = blocks()
    assert_same(fused(plain), plain)
    assert calls == [SHORTCUT, CHAINED, BRANCH]


def test_a_shortcut_with_hooks_another_norm_or_another_span_runs_by_itself(calls: list[tuple[int, bool]]) -> None:
    for change, expected in ((add_hook, []), (use_group_norm, []), (use_another_span, [SHORTCUT])):
        plain = blocks()
        change(plain[0].downsample)
        assert_same(fused(plain), plain)
        assert calls == [*expected, CHAINED, BRANCH], change.__name__
        calls.clear()


def test_a_block_with_a_hook_computes_its_own_first_convolution(calls: list[tuple[int, bool]]) -> None:
    plain = blocks()
    plain[1].register_forward_hook(lambda *_: None)
    assert_same(fused(plain), plain)
    assert calls == [SHORTCUT, BRANCH, BRANCH]


def add_hook(shortcut: nn.Sequential) -> None:
    shortcut.register_forward_hook(lambda *_: None)


def use_group_norm(shortcut: nn.Sequential) -> None:
    shortcut[1] = nn.GroupNorm(4, 16)


def use_another_span(shortcut: nn.Sequential) -> None:
    shortcut[1] = SpanBatchNorm2d(16, span=SPAN + 1)


def test_weight_and_bias_of_two_batch_norms_share_no_memory() -> None:
    _, gradients = step(fused(blocks()))
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    gradients["0.downsample.1.bias"].add_(1.0)  # in place, as another micro-batch adds its gradient
    assert torch.equal(gradients["0.bn3.bias"], before["0.bn3.bias"])
