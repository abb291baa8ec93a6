"""Batch norm by the moments of the convolution's input, against convolution and batch norm one after the other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_cases import error
from ranks import run_processes, run_threads
from stand_in_gpu import StandInGpu
from torch import Tensor
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.kernels import checked
from megabatch.kernels.bottleneck.fold import Group
from megabatch.kernels.dispatch import Backend
from megabatch.kernels.gram import gram_conv1x1_norm
from megabatch.kernels.statistics import RunningAverages

EPS = 1e-5
NAMES = ("z", "dx", "dweight", "dgamma", "dbeta", "dresidual")


class Inputs(NamedTuple):
    """Arguments of the operation, and the gradient of its output."""

    x: Tensor
    weight: Tensor
    gamma: Tensor
    beta: Tensor
    residual: Tensor
    dz: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(t.to(dtype) for t in self))


def draw(
    count: int, inputs: int, outputs: int, size: int, *, dtype: torch.dtype = torch.float64, offset: float = 0.5
) -> Inputs:
    """Images of `offset` standard deviations from 0; parameters are in float32 for 16-bit images."""
    stream = torch.Generator().manual_seed(count + inputs)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=stream, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    x, weight = randn(count, inputs, size, size) + offset, randn(outputs, inputs, 1, 1) / inputs**0.5
    vectors = (t.to(wide) for t in (weight, randn(outputs) + 1, randn(outputs)))
    images = (randn(count, outputs, size, size).to(dtype) for _ in range(2))
    return Inputs(x.to(dtype).contiguous(memory_format=torch.channels_last), *vectors, *images)


def run(function: Callable[..., Tensor], given: Inputs, *, residual: bool = True) -> dict[str, Tensor]:
    """Output and gradients by name."""
    leaves = [t.detach().requires_grad_() for t in given[:-1]]
    z = function(*leaves) if residual else function(*leaves[:-1], None)
    gradients = torch.autograd.grad(z, leaves, given.dz, allow_unused=True)
    return dict(zip(NAMES, (z.detach(), *gradients), strict=True))


def gram(span: int, *, relu: bool = True, **options: object) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None) -> Tensor:
        return gram_conv1x1_norm(x, weight, gamma, beta, span=span, eps=EPS, residual=residual, relu=relu, **options).z  # type: ignore[arg-type]

    return function


def usual(span: int, *, relu: bool = True) -> Callable[..., Tensor]:
    def function(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None) -> Tensor:
        y = functional.conv2d(x, weight.to(x.dtype))
        parts = [functional.batch_norm(p, None, None, gamma, beta, training=True, eps=EPS) for p in y.split(span)]
        z = torch.cat(parts)
        z = z if residual is None else z + residual
        return z.relu() if relu else z

    return function


@pytest.mark.parametrize("span", [16, 37, 128, 512])
@pytest.mark.parametrize("residual", [True, False])
def test_output_and_gradients_are_exact_in_float64(span: int, residual: bool) -> None:
    given = draw(512, 8, 24, 2)
    found, expected = (run(make(span), given, residual=residual) for make in (gram, usual))
    for name in NAMES if residual else NAMES[:-1]:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10, msg=name)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 9), span=st.integers(1, 9), inputs=st.integers(1, 5), outputs=st.integers(1, 5), relu=...)
def test_any_shape_span_and_short_rest_is_exact(count: int, span: int, inputs: int, outputs: int, relu: bool) -> None:
    given = draw(count, inputs, outputs, 2)
    found, expected = (run(make(span, relu=relu), given) for make in (gram, usual))
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("offset", [0.5, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("span", [16, 64])
def test_errors_in_low_precision_are_those_of_convolution_and_batch_norm(
    span: int, dtype: torch.dtype, offset: float
) -> None:
    """Also 30 standard deviations from 0. Without ReLU, whose mask may flip where rounding changes a sign."""
    given = draw(64, 32, 128, 7, dtype=dtype, offset=offset)
    exact = run(usual(span, relu=False), given.to(torch.float64))
    mine, theirs = (
        {n: error(t, exact[n]) for n, t in run(make(span, relu=False), given).items()} for make in (gram, usual)
    )
    for name in NAMES:
        assert mine[name] <= 1.3 * theirs[name] + 1e-6, (name, mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_images_give_gradients_of_parameters_in_float32_accuracy(dtype: torch.dtype) -> None:
    """No 16-bit output y lies between: only the sums are rounded, in float32."""
    given = draw(64, 32, 128, 7, dtype=dtype)
    found, exact = run(gram(16, relu=False), given), run(usual(16, relu=False), given.to(torch.float64))
    for name in ("dweight", "dgamma", "dbeta"):
        assert error(found[name], exact[name]) < 3e-6, name


def test_float32_images_a_thousand_deviations_from_0_keep_their_variance() -> None:
    given = draw(32, 8, 16, 4, dtype=torch.float32, offset=1000.0)
    var = gram_conv1x1_norm(*given[:4], span=32).var[0]
    exact = functional.conv2d(given.x.double(), given.weight.double()).var((0, 2, 3))
    torch.testing.assert_close(var.double(), exact, rtol=1e-4, atol=0)


def test_weights_of_zero_stop_all_gradients_but_their_own() -> None:
    given = draw(32, 8, 16, 4)._replace(gamma=torch.zeros(16, dtype=torch.float64))
    found, expected = run(gram(16), given), run(usual(16), given)
    assert found["dgamma"].abs().min() > 0
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-10, msg=name)


def test_statistics_are_means_and_unbiased_variances_of_the_spans() -> None:
    given = draw(24, 8, 16, 4)
    found = gram_conv1x1_norm(*given[:4], span=16)
    parts = functional.conv2d(given.x, given.weight).split(16)
    torch.testing.assert_close(found.mean, torch.stack([part.mean((0, 2, 3)) for part in parts]))
    torch.testing.assert_close(found.var, torch.stack([part.var((0, 2, 3)) for part in parts]))


def test_one_value_per_channel_gives_the_bias() -> None:
    given = draw(1, 8, 16, 1)
    found = gram_conv1x1_norm(*given[:4], span=1, relu=False)
    torch.testing.assert_close(found.z.flatten(), given.beta)
    assert not found.var.any()


def test_overflow_and_nan_become_nan() -> None:
    for value in (torch.nan, 1e30):
        given = draw(8, 8, 16, 2, dtype=torch.float32)
        given.x[0] = value
        assert gram_conv1x1_norm(*given[:4], span=8).z.isnan().all()


def test_the_small_products_stay_in_float32_under_autocast() -> None:
    given = draw(32, 16, 32, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(gram(16), given)
    for name, expected in run(gram(16), given).items():
        assert torch.equal(found[name], expected), name


def with_next(given: Inputs, span: int, backend: Backend = "reference", **options: Any) -> dict[str, Tensor]:
    """Output and gradients of a block's last convolution and the next block's first, which also adds z to its own."""
    filters = torch.randn(16, len(given.weight), 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [t.detach().requires_grad_() for t in (*given[:-1], (filters / 8).to(given.weight.dtype))]
    *first, residual, following = leaves
    if options.pop("usual", False):
        z = usual(span)(*first, residual)
        y = functional.conv2d(z, following.to(z.dtype))
    else:
        z, y, *_ = gram_conv1x1_norm(
            *first, span=span, eps=EPS, residual=residual, next_weight=following, backend=backend, **options
        )
        assert y is not None
    loss = (z * given.dz).double().sum() + (y * given.dz[:, :16]).double().sum()
    names = (*NAMES, "dnext")
    return {"y": y.detach()} | dict(zip(names, (z.detach(), *torch.autograd.grad(loss, leaves)), strict=True))


@pytest.mark.parametrize("span", [16, 37, 512])
def test_the_next_convolution_adds_and_masks_both_gradients(span: int) -> None:
    given = draw(512, 8, 24, 2)
    found, expected = with_next(given, span), with_next(given, span, usual=True)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-9, msg=name)


def test_a_strided_convolution_is_that_of_every_second_pixel() -> None:
    given = draw(6, 8, 16, 6)
    x, *others = (t.detach().requires_grad_() for t in given[:4])
    z = gram_conv1x1_norm(x, *others, span=4, eps=EPS, stride=(2, 2)).z
    expected = usual(4)(x[:, :, ::2, ::2], *others, None)
    dz = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-10)
    for one, other in zip(*(torch.autograd.grad(out, (x, *others), dz) for out in (z, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("residual", "relu"), [(True, True), (True, False), (False, True)])
def test_the_kernels_give_the_same(interpreter: None, residual: bool, relu: bool) -> None:
    """float16, as Triton's interpreter reads no bfloat16 through descriptors."""
    given = draw(5, 16, 32, 3, dtype=torch.float16)
    found, expected = (
        run(gram(2, relu=relu, backend=backend), given, residual=residual) for backend in ("triton", "reference")
    )
    errors = {name: error(found[name], expected[name].double()) for name in NAMES if found[name] is not None}
    assert len(errors) == (6 if residual else 5)
    assert max(errors.values()) < 2e-3, errors


@pytest.mark.parametrize("span", [16, 37, 128, 512])
def test_the_kernels_have_the_errors_of_rounding_once(interpreter: None, span: int) -> None:
    """Against float64; the residual keeps all sums away from 0, where a rounding would flip ReLU's mask."""
    given = draw(128 if span < 128 else span, 16, 48, 1, dtype=torch.float16)
    given = given._replace(residual=given.residual.sign() * 8)
    found, exact = with_next(given, span, "triton"), with_next(given.to(torch.float64), span)
    for name, values in exact.items():
        # The gradient of the next filter is torch's, which on a CPU sums in 16 bit.
        assert error(found[name], values) < (5e-3 if name == "dnext" else 5e-4), name


class AllRight(dict[object, bool]):
    """Verdicts as if every kernel had been compared with torch's operations and found right."""

    def get(self, *_: object) -> bool:  # type: ignore[override]
        return True


def test_a_step_with_its_statistics_can_be_captured_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(checked, "_is_right", AllRight())  # launches on a stand-in compute nothing
    launched: list[str] = []
    with StandInGpu(launch=lambda kernel, *_: launched.append(kernel)):
        given = Inputs(*(t.to("cuda:0") for t in draw(6, 16, 32, 4, dtype=torch.float16)))
        following = torch.zeros(16, 32, 1, 1, device="cuda:0", dtype=torch.float16)
        mean, var, steps = (torch.zeros(size, device="cuda:0") for size in (32, 32, ()))

        def step() -> None:
            leaves = [t.detach().requires_grad_() for t in (*given[:4], following)]
            averages = RunningAverages(mean, var, steps, 0.1, 0.5)
            output = gram_conv1x1_norm(
                *leaves[:4], span=4, residual=given.residual, next_weight=leaves[4], sink=averages
            )
            torch.autograd.grad((output.z, output.next_y), leaves, (given.dz, output.next_y.detach()))

        step()
        launched.clear()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            step()
    forward = ["gram_kernel", "fold_kernel", "product_kernel"]
    backward = ["product_kernel", "gram_kernel", "filter_gradient_kernel", "correction_kernel", "product_kernel"]
    assert launched == forward + backward


def share(counts: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Results of one rank, which has counts[rank] of the samples."""
    rank = dist.get_rank()
    given = draw(sum(counts), 8, 16, 3, dtype=dtype)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    local = given._replace(x=given.x[mine], residual=given.residual[mine], dz=given.dz[mine])
    result = gram_conv1x1_norm(*local[:4], span=0, group=Group(None))
    statistics = {"mean": result.mean, "var": result.var, "num_rows": result.num_rows}
    return run(gram(0, group=Group(None)), local) | statistics


def assert_is_gathered(ranks: list[dict[str, Tensor]], counts: list[int]) -> None:
    given = draw(sum(counts), 8, 16, 3)
    expected = run(usual(sum(counts)), given)
    for name in NAMES:
        on_ranks = [rank[name] for rank in ranks]
        found = torch.cat(on_ranks) if expected[name].ndim == 4 and name != "dweight" else sum(on_ranks)
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-10, msg=name)
    y = functional.conv2d(given.x, given.weight)
    for rank in ranks:
        torch.testing.assert_close(rank["mean"][0], y.mean((0, 2, 3)))
        torch.testing.assert_close(rank["var"][0], y.var((0, 2, 3)))
        assert torch.equal(rank["var"], ranks[0]["var"])
        assert rank["num_rows"].tolist() == [[9 * sum(counts)]]


@pytest.mark.parametrize("counts", [[4, 3], [5, 0, 2]])
def test_ranks_that_share_a_span_give_what_one_would(counts: list[int]) -> None:
    assert_is_gathered(run_threads(len(counts), share, counts, torch.float64), counts)


@pytest.mark.multiprocess
def test_two_processes_share_a_span_over_gloo() -> None:
    assert_is_gathered(run_processes(2, share, [4, 3], torch.float64), [4, 3])


def sent() -> list[int]:
    """Values of each all-reduce of a forward and a backward."""
    sizes: list[int] = []
    reduce = dist.all_reduce

    def counted(tensor: Tensor, **options: object) -> None:
        sizes.append(tensor.numel())
        reduce(tensor, **options)

    dist.all_reduce = counted
    run(gram(1, group=Group(None)), draw(4, 8, 16, 3))
    return sizes


@pytest.mark.multiprocess
def test_one_message_goes_forward_and_one_backward() -> None:
    assert run_processes(2, sent) == [[9 * 10 // 2, 2 * 16]] * 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(16, 4, 1, 1)}, r"needed: images \(N, C, H, W\)"),
        ({"weight": torch.zeros(16, 8, 3, 3)}, r"needed: images \(N, C, H, W\)"),
        ({"gamma": torch.zeros(8)}, "two vectors of K"),
        ({"residual": torch.zeros(4, 8, 2, 2)}, "the residual is"),
        ({"x": torch.zeros(0, 8, 2, 2), "residual": torch.zeros(0, 16, 2, 2)}, "span=32 works"),
    ],
)
def test_tensors_that_do_not_agree_are_refused(change: dict[str, Tensor], words: str) -> None:
    given = draw(4, 8, 16, 2, dtype=torch.float32)._replace(**change)
    with pytest.raises(UserError, match=words):
        gram(4)(*given[:-1])
