"""Convolutions by the compiled CPU kernels: which layers they support, and that results equal torch's."""

import functools

import pytest
import torch
from torch import Tensor, nn

from megabatch.kernels.cpu import conv as cpu_conv
from megabatch.nn import resnet
from megabatch.nn.fused.convolution import convolve
from megabatch.nn.fused.fuse import set_fusion
from megabatch.nn.resnet import resnet18
from megabatch.nn.small import resnet8

needs_kernels = pytest.mark.skipif(not cpu_conv.is_available(), reason="no compiled kernels or no AVX-512 BF16")
needs_float32 = pytest.mark.skipif(not cpu_conv.is_available(torch.float32), reason="no compiled kernels or no AVX2")


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)


def autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def is_ours(y: Tensor) -> bool:
    return y.grad_fn is not None and "_Conv2d" in y.grad_fn.name()


@needs_kernels
@pytest.mark.parametrize(("taps", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_output_and_gradients_of_a_layer_equal_torchs_up_to_the_order_of_sums(taps, stride):
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 48, taps, stride, padding=taps // 2, bias=False).to(memory_format=torch.channels_last)
    found = []
    for run, ours in ((functools.partial(convolve, layer, backend="auto"), True), (layer, False)):
        x = images(8, 32, 9, 9).requires_grad_()
        with autocast():
            y = run(x)
        assert y.dtype == torch.bfloat16
        assert is_ours(y) == ours
        y.float().square().sum().backward()
        found.append((y.detach(), x.grad, layer.weight.grad))
        layer.weight.grad = None
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).float().norm() < 2e-3 * theirs.float().norm()


@needs_kernels
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(16, 16, 3, padding=1),  # with a bias
        nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular", bias=False),
        nn.Conv2d(16, 16, 3, padding="same", bias=False),
        nn.Conv2d(16, 16, (3, 1), padding=(1, 0), bias=False),
        nn.Conv2d(16, 16, 3, stride=(1, 2), padding=1, bias=False),
        nn.Conv2d(16, 24, 3, padding=1, bias=False),  # output channels not a multiple of 16
        resnet.BlurConv2d(16, 16, 3, 2, padding=1, bias=False),
    ],
)
def test_unsupported_convolutions_run_in_torch(layer):
    x = images(8, 16, 8, 8)
    with autocast():
        y = convolve(layer, x, "auto")
        assert not is_ours(y)
        assert torch.equal(y, layer(x))


@needs_float32
def test_layers_with_hooks_run_in_torch():
    layer, x, seen = nn.Conv2d(16, 32, 1, stride=2, bias=False), images(8, 16, 8, 8), []
    assert is_ours(convolve(layer, x, "auto"))
    layer.register_forward_hook(lambda *_: seen.append(1))
    assert not is_ours(convolve(layer, x, "auto"))
    assert seen == [1]


@needs_float32
def test_only_the_type_of_autocast_is_computed():
    layer, x = nn.Conv2d(16, 32, 1, stride=2, bias=False), images(8, 16, 8, 8)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            y = convolve(layer, x, "auto")
        assert y.dtype == dtype
        assert is_ours(y) == cpu_conv.is_available(dtype)
    with pytest.raises(RuntimeError, match="type"):
        convolve(layer, x.bfloat16(), "auto")


@needs_float32
@pytest.mark.parametrize("make", [lambda: resnet8(in_channels=3), lambda: resnet18(small_stem=True)])
def test_float32_gradients_of_a_network_are_as_close_to_float64_as_torchs(make):
    """Relative error against float64, all gradients as one vector; with fusion some convolutions are compiled."""

    def gradients(fusion: str, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(3)
        model = make().to(dtype=dtype, memory_format=torch.channels_last)
        set_fusion(model, fusion)
        logits = model(images(16, 3, 16, 16).to(dtype))
        nn.functional.cross_entropy(logits, torch.arange(16) % 10).backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    exact = gradients("plain", torch.float64)
    ours, plain = ((gradients(fusion, torch.float32) - exact).norm() / exact.norm() for fusion in ("auto", "plain"))
    assert ours != plain
    assert ours < 1.5 * plain + 1e-6


@needs_kernels
@pytest.mark.parametrize("make", [lambda: resnet8(in_channels=3), lambda: resnet18(small_stem=True)])
def test_gradients_of_a_network_are_as_close_to_float64_as_those_of_plain_autocast(make):
    """Relative error against float64, all gradients as one vector."""

    def gradients(fusion: str, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(3)
        model = make().to(dtype=dtype, memory_format=torch.channels_last)
        set_fusion(model, fusion)
        x = images(16, 3, 16, 16).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            logits = model(x)
        nn.functional.cross_entropy(logits.to(dtype), torch.arange(16) % 10).backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()])

    exact = gradients("plain", torch.float64)
    ours, plain = ((gradients(fusion, torch.float32) - exact).norm() / exact.norm() for fusion in ("auto", "plain"))
    assert ours < 1.02 * plain
    assert plain < 0.1
