"""The stem: zero-padded input channels change no result, and the fused pooling equals the separate operations."""

import contextlib
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megabatch.nn.fused.stem import norm_relu_pool, stem_convolution
from megabatch.nn.resnet import convolution


def run(forward: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor, *, autocast: bool) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
        y = forward(x)
    (gradient,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    return y.detach(), gradient


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [True, False])
def test_zero_channels_change_neither_output_nor_gradient(autocast: bool, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    conv, x = convolution(3, 16, 7, 2), torch.randn(2, 3, 20, 18).contiguous(memory_format=layout)
    if not autocast:
        conv, x = conv.bfloat16(), x.bfloat16()
    y, gradient = run(functools.partial(stem_convolution, conv, backend="reference"), conv.weight, x, autocast=autocast)
    expected, expected_gradient = run(conv, conv.weight, x, autocast=autocast)
    assert (y.dtype, y.shape, gradient.dtype, gradient.shape) == (
        torch.bfloat16,
        expected.shape,
        conv.weight.dtype,
        conv.weight.shape,
    )
    torch.testing.assert_close(y, expected, rtol=2.0**-7, atol=2.0**-7)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2.0**-6, atol=2.0**-6 * float(expected_gradient.max()))


@pytest.mark.parametrize(("channels", "width"), [(1, 4), (3, 4), (5, 5)])
def test_in_16_bit_images_have_at_least_four_channels(
    monkeypatch: pytest.MonkeyPatch, channels: int, width: int
) -> None:
    conv, widths = convolution(channels, 16, 7, 2).bfloat16(), []
    forward = conv._conv_forward
    monkeypatch.setattr(conv, "_conv_forward", lambda x, *rest: widths.append(x.shape[1]) or forward(x, *rest))
    y = stem_convolution(conv, torch.randn(2, channels, 8, 8).bfloat16(), "reference")
    assert (widths, y.shape) == ([width], (2, 16, 4, 4))


def test_in_float32_and_with_a_hook_the_convolution_is_not_padded() -> None:
    torch.manual_seed(0)
    conv, x = convolution(3, 16, 7, 2), torch.randn(2, 3, 8, 8)
    assert torch.equal(stem_convolution(conv, x, "reference"), conv(x))
    seen: list[torch.Size] = []
    conv.bfloat16().register_forward_hook(lambda *given: seen.append(given[1][0].shape))
    stem_convolution(conv, x.bfloat16(), "reference")
    assert seen == [x.shape]


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d((3, 3), (2, 2), (1, 1), (1, 1)),
        nn.MaxPool2d(2, 2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1),
        nn.Identity(),
    ],
)
def test_norm_relu_and_any_pool_equal_the_separate_operations(pool: nn.Module) -> None:
    torch.manual_seed(0)
    norm, other = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    x = torch.randn(4, 8, 9, 6)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    ours = norm_relu_pool(norm, pool, leaves[0], backend="reference")
    expected = pool(torch.relu(other(leaves[1])))
    slope = torch.randn_like(expected)
    torch.testing.assert_close(ours, expected)
    pairs = zip((ours, expected), leaves, strict=True)
    torch.testing.assert_close(*(torch.autograd.grad(y, leaf, slope)[0] for y, leaf in pairs))
    torch.testing.assert_close(norm.running_var, other.running_var)


@pytest.mark.parametrize("autocast", [True, False])
def test_images_that_come_padded_give_the_bits_of_those_that_do_not(autocast: bool) -> None:
    torch.manual_seed(0)
    conv, x = (
        convolution(3, 16, 7, 2),
        torch.randn(2, 3, 20, 18).bfloat16().contiguous(memory_format=torch.channels_last),
    )
    if not autocast:
        conv = conv.bfloat16()
    padded = nn.functional.pad(x, (0, 0, 0, 0, 0, 1)).contiguous(memory_format=torch.channels_last)
    forward = functools.partial(stem_convolution, conv, backend="reference")
    for one, other in zip(
        run(forward, conv.weight, padded, autocast=autocast),
        run(forward, conv.weight, x, autocast=autocast),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_where_the_stem_runs_plain_the_zero_channels_are_left_out() -> None:
    torch.manual_seed(0)
    conv, x = convolution(3, 16, 7, 2).bfloat16(), torch.randn(2, 3, 8, 8).bfloat16()
    padded = nn.functional.pad(x, (0, 0, 0, 0, 0, 1))
    hook = conv.register_forward_hook(lambda *_: None)  # a convolution with a hook runs plain
    assert torch.equal(stem_convolution(conv, padded, "reference"), conv(x))
    hook.remove()
    for others in (torch.randn(2, 5, 8, 8).bfloat16(), torch.randn(2, 4, 8, 8)):  # four float32 channels are no padding
        with pytest.raises(RuntimeError, match="expected input"), torch.autocast("cpu"):
            stem_convolution(conv.float(), others, "reference")
    of_four = convolution(4, 16, 7, 2).bfloat16()
    assert torch.equal(stem_convolution(of_four, padded, "reference"), of_four(padded))
