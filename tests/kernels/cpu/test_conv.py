"""The compiled convolutions for CPUs against torch's in float64."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from megabatch.kernels.cpu import conv as cpu_conv

ROUNDING = {torch.bfloat16: 2.0**-9, torch.float32: 1e-6}
"""Relative errors: half a unit in the last place of bfloat16, which has 8 significant bits; sums in float32."""


class Target(NamedTuple):
    """Kernels, by their key in `cpu_conv._LANES`, and the type of their images."""

    name: str
    dtype: torch.dtype


FLOAT32 = tuple(Target(name, torch.float32) for name in ("avx512", "avx2"))


@pytest.fixture(params=[Target("bf16", torch.bfloat16), *FLOAT32], ids=lambda chosen: chosen.name)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    """These kernels compute all parts of every shape they support; skips those that cannot run on this processor."""
    chosen: Target = request.param
    kernels = cpu_conv._open(chosen.name)
    if kernels is None:
        pytest.skip("no compiled kernels, or not for this processor")
    monkeypatch.setattr(cpu_conv, "_kernels", lambda dtype: kernels if dtype == chosen.dtype else None)
    monkeypatch.setattr(cpu_conv, "_is_faster", lambda *_: True)
    return chosen


class Case(NamedTuple):
    """x (images, inputs, height, width), weight (outputs, inputs, down, across).

    Channels are for registers of 16; `drawn` has half of them for kernels with registers of 8.
    """

    images: int
    inputs: int
    outputs: int
    height: int
    width: int
    down: int = 3
    across: int = 3
    stride: int = 1
    padding: int = 1


CASES = (
    Case(16, 16, 16, 14, 14),
    Case(13, 16, 32, 7, 7, stride=2),  # an odd number of images
    Case(27, 64, 64, 4, 4),  # tiles of different numbers of images
    Case(9, 80, 112, 5, 6),  # a strip of 16 channels behind one of 64
    Case(8, 96, 272, 4, 4),  # several tiles
    Case(8, 48, 48, 40, 33),  # several blocks of pixels in an image
    Case(8, 32, 64, 9, 9, down=1, across=1, stride=2, padding=0),
    Case(8, 272, 336, 3, 3, down=1, across=1, padding=0),  # several tiles, and strips in each
    Case(8, 16, 16, 8, 9, stride=3),
    Case(8, 16, 32, 6, 5, down=5, across=2, padding=2),
    Case(8, 16, 16, 2, 1, down=1, across=1, padding=2),  # most output pixels see only padding
    Case(8, 16, 16, 3, 3, down=3, across=3, padding=0),  # one pixel of output
    Case(8, 16, 16, 7, 7, down=1, across=2, stride=3, padding=0),  # pixels that no tap reads
    Case(15, 1, 16, 28, 28, stride=2),  # few channels
    Case(27, 3, 64, 32, 32),
    Case(9, 3, 80, 37, 41, down=7, across=7, stride=2, padding=3),
    Case(8, 5, 32, 2, 1, down=1, across=2, padding=3),
)


class Run(NamedTuple):
    """Output and gradients."""

    y: Tensor
    dx: Tensor
    dweight: Tensor


def drawn(case: Case, target: Target, *, integers: bool = False, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and dy in channels_last. With `integers`, values from -2 to 2, whose sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    lanes = cpu_conv._LANES[target.name]
    inputs = case.inputs * lanes // 16 if case.inputs >= 16 else min(case.inputs, lanes - 1)
    shape = (case.images, inputs, case.height, case.width)
    weight_shape = (case.outputs * lanes // 16, inputs, case.down, case.across)
    y = functional.conv2d(torch.empty(shape, device="meta"), torch.empty(weight_shape, device="meta"), **where(case))

    def draw(shape: Any) -> Tensor:
        if integers:
            values = torch.randint(-2, 3, shape, generator=generator).float()
        else:
            values = torch.randn(shape, generator=generator)
        return values.to(target.dtype).contiguous(memory_format=torch.channels_last)

    return draw(shape), draw(weight_shape), draw(y.shape)


def where(case: Case) -> dict[str, int]:
    return {"stride": case.stride, "padding": case.padding}


def run(case: Case, x: Tensor, weight: Tensor, dy: Tensor, *, function: Any = cpu_conv.conv2d) -> Run:
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    y = function(*leaves, **where(case))
    return Run(y.detach(), *torch.autograd.grad(y, leaves, dy))


def exact(case: Case, *given: Tensor) -> Run:
    return run(case, *(t.double() for t in given), function=functional.conv2d)


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_of_integers_are_exact_and_rounded_once(case: Case, target: Target) -> None:
    given = drawn(case, target, integers=True)
    assert cpu_conv.supports(*given[:2])
    for result, expected in zip(run(case, *given), exact(case, *given), strict=True):
        assert torch.equal(result, expected.to(target.dtype))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.integers(8, 30),
    channels=st.tuples(st.integers(1, 15) | st.sampled_from((16, 32, 48, 64, 80, 96)), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    taps=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_sums_of_integers_are_exact_for_any_shape(
    target: Target,
    images: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    taps: tuple[int, int],
    stride: int,
    padding: int,
    seed: int,
) -> None:
    size = (max(size[0], taps[0] - 2 * padding), max(size[1], taps[1] - 2 * padding))
    case = Case(images, channels[0], 16 * channels[1], *size, *taps, stride, padding)
    given = drawn(case, target, integers=True, seed=seed)
    for result, expected in zip(run(case, *given), exact(case, *given), strict=True):
        assert torch.equal(result, expected.to(target.dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_errors_are_within_one_rounding_and_no_larger_than_those_of_torch(case: Case, target: Target) -> None:
    given = drawn(case, target)
    ours, theirs = run(case, *given), run(case, *given, function=functional.conv2d)
    for result, other, expected in zip(ours, theirs, exact(case, *given), strict=True):
        assert error(result, expected) <= ROUNDING[target.dtype]
        assert error(result, expected) <= 1.01 * error(other, expected) + 1e-6


@pytest.mark.parametrize("case", CASES[:8], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(case: Case, target: Target) -> None:
    given = drawn(case, target)
    alone = run(case, *given)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(case, *given), alone))


@pytest.mark.parametrize(
    ("case", "which"), [(case, which) for case in CASES for which in range(3) if which != 1 or case.inputs % 16 == 0]
)
def test_kernels_access_only_their_tensors_and_write_all_of_the_result(case: Case, which: int, target: Target) -> None:
    x, weight, dy = map(amid_nans, drawn(case, target))
    like = (dy, x, weight)[which]
    result, y = amid_nans(torch.full_like(like, float("nan"))), like if which == 0 else dy
    before = [bits(t) for t in (x, weight, dy)]
    cpu_conv._call(which, x, weight, y, result, case.stride, case.padding)
    assert all(map(torch.equal, before, [bits(t) for t in (x, weight, dy)]))
    assert not result.isnan().any()
    assert result._base is not None
    assert result._base.isnan().sum() == result._base.numel() - result.numel()


def bits(tensor: Tensor) -> Tensor:
    """A copy of the bits of the memory around the tensor."""
    assert tensor._base is not None
    return tensor._base.clone().view(torch.int16)


def amid_nans(tensor: Tensor) -> Tensor:
    """A copy of the tensor, surrounded by NaN in memory."""
    _, channels, height, width = tensor.shape
    memory = torch.full((tensor.numel() + 256,), float("nan"), dtype=tensor.dtype)
    strides = (height * width * channels, 1, width * channels, channels)
    return memory.as_strided(tensor.shape, strides, 128).copy_(tensor)


def test_only_required_gradients_are_computed(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    case, called, call = CASES[0], [], cpu_conv._call
    monkeypatch.setattr(cpu_conv, "_call", lambda which, *rest: (called.append(which), call(which, *rest)))
    x, weight, dy = drawn(case, target)
    expected = run(case, x, weight, dy)
    for wanted, index in ((x, 1), (weight, 2)):
        called.clear()
        leaf = wanted.requires_grad_()
        (gradient,) = torch.autograd.grad(cpu_conv.conv2d(x, weight, **where(case)), leaf, dy)
        leaf.requires_grad_(requires_grad=False)
        assert called == [0, index]
        assert torch.equal(gradient, expected[index])


def test_gradients_have_the_memory_layout_of_their_tensors(target: Target) -> None:
    for case in (CASES[0], CASES[5]):
        x, weight, dy = drawn(case, target)
        expected = run(case, x, weight, dy)
        for layout in (torch.contiguous_format, torch.channels_last):
            leaf = weight.contiguous(memory_format=layout)
            result = run(case, x, leaf, dy.contiguous())
            assert result.dweight.stride() == leaf.stride()
            assert result.dx.stride() == x.stride()
            assert all(map(torch.equal, result, expected))


def test_a_second_derivative_raises_an_error(target: Target) -> None:
    x, weight, dy = drawn(CASES[0], target)
    leaf, slope = weight.requires_grad_(), dy.requires_grad_()
    (gradient,) = torch.autograd.grad(cpu_conv.conv2d(x, leaf, padding=1), leaf, slope, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_unsupported_arguments_use_torch(target: Target) -> None:
    x, weight, _ = drawn(CASES[0], target)
    others = {
        "float64": (x.double(), weight.double()),
        "channels first": (x.contiguous(), weight),
        "few images": (x[:7], weight),
        "a channel too many": (torch.cat((x, x[:, :1]), 1), torch.cat((weight, weight[:, :1]), 1)),
        "4 outputs": (x, weight[:4]),
        "no image": (x[:0], weight),
    }
    for images, taps in others.values():
        assert not cpu_conv.supports(images, taps)
        y = cpu_conv.conv2d(images, taps, stride=2, padding=1)
        assert torch.equal(y, functional.conv2d(images, taps, stride=2, padding=1))


def test_without_the_kernels_torch_is_used(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_conv, "_kernels", lambda _: None)
    x, weight, _ = drawn(CASES[0], target)
    assert not cpu_conv.is_available(target.dtype)
    assert torch.equal(cpu_conv.conv2d(x, weight, padding=1), functional.conv2d(x, weight, padding=1))


@pytest.mark.parametrize("options", [{"stride": 0}, {"padding": -1}, {}])
def test_invalid_arguments_raise_torchs_errors(target: Target, options: dict[str, int]) -> None:
    x, weight, _ = drawn(Case(8, 16, 16, 2, 2), target)
    with pytest.raises(RuntimeError):
        cpu_conv.conv2d(x, weight, **options)


def test_a_failed_allocation_raises_memory_error(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = cpu_conv._Kernels(cpu_conv._LANES[target.name], (lambda _: 1,) * 3)
    monkeypatch.setattr(cpu_conv, "_kernels", lambda _: failing)
    x, weight, _ = drawn(CASES[0], target)
    with pytest.raises(MemoryError, match="could not allocate memory"):
        cpu_conv.conv2d(x, weight, padding=1)


def test_the_gradient_of_images_with_few_channels_is_torchs(target: Target) -> None:
    case = Case(8, 3, 16, 6, 6)
    given = drawn(case, target, integers=True)
    assert cpu_conv.supports(*given[:2])
    for result, expected in zip(run(case, *given), exact(case, *given), strict=True):
        assert torch.equal(result, expected.to(target.dtype))


def test_a_nan_reaches_every_sum_that_reads_it_and_no_other(target: Target) -> None:
    case = Case(13, 32, 32, 6, 6)
    x, weight, dy = drawn(case, target)
    x[3, 5, 0, 0] = float("nan")
    result = run(case, x, weight, dy)
    theirs = run(case, x, weight, dy, function=functional.conv2d)
    assert torch.equal(result.y.isnan(), theirs.y.isnan())
    assert not result.dx.isnan().any()
    assert torch.equal(result.dweight[:, 5, :2, :2].isnan(), theirs.dweight[:, 5, :2, :2].isnan())
    assert not result.dweight[:, 6].isnan().any()


@pytest.mark.parametrize("target", FLOAT32, indirect=True)
@pytest.mark.parametrize(
    "ours", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3], ids=str
)
def test_in_float32_only_the_faster_parts_are_compiled(
    target: Target, ours: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case, called, call = Case(9, 32, 48, 5, 6, stride=2), [], cpu_conv._call
    monkeypatch.setattr(cpu_conv, "_is_faster", lambda which, *_: ours[which])
    monkeypatch.setattr(cpu_conv, "_call", lambda which, *rest: (called.append(which), call(which, *rest)))
    given = drawn(case, target, integers=True)
    for result, expected in zip(run(case, *given), exact(case, *given), strict=True):
        assert torch.equal(result, expected.float())
    assert called == [which for which in range(3) if ours[which]]


@pytest.mark.parametrize(
    ("case", "narrow", "wide"),
    [
        (Case(64, 1, 16, 28, 28, stride=2), (True, False, True), (True, False, True)),  # the demo's first layer
        (Case(64, 64, 64, 4, 4), (True, True, True), (True, True, True)),
        (Case(64, 64, 64, 14, 14, stride=2), (True, True, False), (True, True, True)),
        (Case(64, 128, 128, 16, 16), (False, False, False), (False, False, False)),
        (Case(64, 256, 512, 28, 28, 1, 1, 2, 0), (False, True, False), (True, True, False)),
    ],
    ids=str,
)
def test_float32_kernels_are_chosen_by_shape(
    monkeypatch: pytest.MonkeyPatch, case: Case, narrow: tuple[bool, ...], wide: tuple[bool, ...]
) -> None:
    x, weight, _ = drawn(case, Target("avx512", torch.float32))
    for lanes, expected in ((8, narrow), (16, wide)):
        kernels = cpu_conv._Kernels(lanes, ())
        monkeypatch.setattr(cpu_conv, "_kernels", lambda _, kernels=kernels: kernels)
        assert cpu_conv._faster_parts(x, weight, case.stride, case.padding) == expected
