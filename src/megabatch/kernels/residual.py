"""The parts of a bottleneck block that are more than one operation each: batch norms where 1x1 convolutions read.

Between a block's last convolution and the next block's first stand batch norm, a residual sum and ReLU
(`join_conv1x1`); between its 3x3 and its last convolution stand batch norm and ReLU (`norm_conv1x1`). Each is one
differentiable function, because each convolution's gradients can do part of the batch norm's backward as they write.
How each part is computed (torch's convolution between the passes of `norm_passes`, or a kernel of `conv1x1` in one of
its tilings) is chosen by measuring (`tuning`).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.kernels import conv1x1, tuning
from megabatch.kernels import norm_passes as passes
from megabatch.kernels.batch_norm import check, over_spans
from megabatch.kernels.conv1x1 import Tiling
from megabatch.kernels.dispatch import Backend, use_triton
from megabatch.kernels.norm_passes import Moments, Normalisation

Result = TypeVar("Result")
TASKS = tuple(f"{part} {what}" for part in ("norm_conv", "join_conv") for what in ("forward", "data", "weight"))
"""What the table of `tuning` is asked about: forward, data gradient and weight gradient of each."""


def norm_conv1x1(
    x: Tensor,
    moments: Moments,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    *,
    span: int,
    eps: float,
    backend: Backend = "auto",
) -> tuple[Tensor, Moments]:
    """`(y, moments of y)`: y = weight relu(batch norm of x), where `moments` are those of x's spans.

    The gradient is that of all three, batch norm's statistics included. `eps` is that of the batch norm behind y. Where
    a kernel reads x through batch norm, its result is never in memory; backward computes it again.

    Shapes: x (N, C, H, W), weight (K, C, 1, 1), cast to x's type; norm_weight and norm_bias (C,) float32.

    Raises:
        UserError: tensors of shapes or types that do not agree.
    """
    _check(x, moments, norm_weight, norm_bias, None, weight, span)
    y, *found = _NormConv.apply(
        x, moments.mean, moments.deviation, norm_weight, norm_bias, weight, span, eps, use_triton(x, backend)
    )  # type: ignore[no-untyped-call]
    return y, Moments(*found)


def join_conv1x1(
    x: Tensor,
    moments: Moments,
    norm_weight: Tensor,
    norm_bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    span: int,
    eps: float,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Moments]:
    """`(z, y, moments of y)`: z = relu(batch norm of x + residual) and y = weight z; as `norm_conv1x1` otherwise.

    In backward the gradients that reach z through y and past it are added, masked and summed for the batch norm in one
    pass, which is the convolution's own where the kernel is faster.

    Raises:
        UserError: tensors of shapes or types that do not agree.
    """
    _check(x, moments, norm_weight, norm_bias, residual, weight, span)
    z, y, *found = _JoinConv.apply(
        x, moments.mean, moments.deviation, norm_weight, norm_bias, residual, weight, span, eps, use_triton(x, backend)
    )  # type: ignore[no-untyped-call]
    return z, y, Moments(*found)


def _check(
    x: Tensor,
    moments: Moments,
    norm_weight: Tensor,
    norm_bias: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    span: int,
) -> None:
    check(x, norm_weight, norm_bias, residual, span, moments)
    if weight.shape != (len(weight), x.shape[1], 1, 1):
        raise UserError(
            f"the weight is {tuple(weight.shape)}, needed for x {tuple(x.shape)}: (K, {x.shape[1]}, 1, 1); "
            f"(64, {x.shape[1]}, 1, 1) works"
        )


class _NormConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        deviation: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        span: int,
        eps: float,
        triton: bool,
    ) -> tuple[Tensor, ...]:
        norm = Normalisation(mean, deviation, norm_weight, norm_bias)
        small = weight.to(x.dtype)

        def plain() -> tuple[Tensor | None, Tensor, Moments]:
            h = passes.normalise(x, norm, span=span, triton=triton)
            y = functional.conv2d(h, small)
            return h, y, passes.moments(y, span=span, eps=eps, triton=triton)

        def fused(tiling: Tiling) -> tuple[Tensor | None, Tensor, Moments]:
            y, found = conv1x1.conv1x1_forward(
                x, small, span=span, eps=eps, normalisation=norm, tiling=tiling, backend="triton"
            )
            return None, y, found

        h, y, found = _take("norm_conv forward", x, small, plain, fused, conv1x1.FORWARD_TILINGS, triton=triton)
        ctx.save_for_backward(x, *norm, small, *([] if h is None else [h]))
        ctx.filter = _Filter.of(weight)
        ctx.options = {"span": span, "triton": triton}
        ctx.mark_non_differentiable(*found)
        return y, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, deviation, norm_weight, norm_bias, small, *kept = ctx.saved_tensors
        norm = Normalisation(mean, deviation, norm_weight, norm_bias)

        def plain() -> tuple[Tensor, Tensor]:
            dh = _data_gradient(dy, x, small)
            _, sums = passes.gradient_sums(dh, x, norm, **ctx.options)
            return passes.input_gradient(dh, x, norm, sums, relu=True, **ctx.options), sums

        def fused(tiling: Tiling) -> tuple[Tensor, Tensor]:
            dz, sums = conv1x1.conv1x1_data_gradient(
                dy, small, x, norm, span=ctx.options["span"], tiling=tiling, backend="triton"
            )
            return passes.input_gradient(dz, x, norm, sums, relu=False, **ctx.options), sums

        tilings = conv1x1.DATA_GRADIENT_TILINGS
        dx, sums = _take("norm_conv data", x, small, plain, fused, tilings, triton=ctx.options["triton"])
        dbias, dscale = over_spans(sums)
        dweight = _weight_gradient("norm_conv weight", dy, x, norm, small, kept[0] if kept else None, **ctx.options)
        return dx, None, None, dscale, dbias, ctx.filter.gradient(dweight), None, None, None


class _JoinConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        deviation: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        residual: Tensor,
        weight: Tensor,
        span: int,
        eps: float,
        triton: bool,
    ) -> tuple[Tensor, ...]:
        norm = Normalisation(mean, deviation, norm_weight, norm_bias)
        small = weight.to(x.dtype)
        z = passes.normalise(x, norm, span=span, residual=residual, triton=triton)

        def plain() -> tuple[Tensor, Moments]:
            y = functional.conv2d(z, small)
            return y, passes.moments(y, span=span, eps=eps, triton=triton)

        def fused(tiling: Tiling) -> tuple[Tensor, Moments]:
            return conv1x1.conv1x1_forward(z, small, span=span, eps=eps, tiling=tiling, backend="triton")

        y, found = _take("join_conv forward", x, small, plain, fused, conv1x1.FORWARD_TILINGS, triton=triton)
        ctx.save_for_backward(x, *norm, z, small)
        ctx.filter = _Filter.of(weight)
        ctx.options = {"span": span, "triton": triton}
        ctx.mark_non_differentiable(*found)
        return z, y, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, past: Tensor, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, deviation, norm_weight, norm_bias, z, small = ctx.saved_tensors
        norm = Normalisation(mean, deviation, norm_weight, norm_bias)

        def plain() -> tuple[Tensor, Tensor]:
            through = _data_gradient(dy, z, small)
            return passes.gradient_sums(through, x, norm, output=z, addend=past, **ctx.options)

        def fused(tiling: Tiling) -> tuple[Tensor, Tensor]:
            span = ctx.options["span"]
            return conv1x1.conv1x1_data_gradient(
                dy, small, x, norm, span=span, output=z, addend=past, tiling=tiling, backend="triton"
            )

        tilings = conv1x1.DATA_GRADIENT_TILINGS
        dz, sums = _take("join_conv data", x, small, plain, fused, tilings, triton=ctx.options["triton"])
        dx = passes.input_gradient(dz, x, norm, sums, relu=False, **ctx.options)
        dbias, dscale = over_spans(sums)
        dweight = _weight_gradient("join_conv weight", dy, z, None, small, z, **ctx.options)
        return dx, None, None, dscale, dbias, dz, ctx.filter.gradient(dweight), None, None, None


def _weight_gradient(
    task: str,
    dy: Tensor,
    x: Tensor,
    norm: Normalisation | None,
    small: Tensor,
    h: Tensor | None,
    *,
    span: int,
    triton: bool,
) -> Tensor:
    """Of the convolution whose input is x, normalised by `norm`; `h` is that input where it is in memory."""

    def plain() -> Tensor:
        assert norm is not None or h is not None
        given = passes.normalise(x, norm, span=span, triton=triton) if h is None and norm is not None else h
        return _convolution_backward(dy, given, small, [False, True, False])[1]

    def fused(tiling: Tiling) -> Tensor:
        return conv1x1.conv1x1_weight_gradient(dy, x, span=span, normalisation=norm, tiling=tiling, backend="triton")

    tilings = conv1x1.WEIGHT_GRADIENT_TILINGS
    return _take(task, x, small, plain, fused, tilings, triton=triton, more=(int(h is not None),))


def _take(
    task: str,
    x: Tensor,
    weight: Tensor,
    plain: Callable[[], Result],
    fused: Callable[[Tiling], Result],
    tilings: tuple[Tiling, ...],
    *,
    triton: bool,
    more: tuple[int, ...] = (),
) -> Result:
    """The result of the faster: torch's convolution between passes, or a kernel in one of its tilings."""
    ways: Mapping[str, Callable[[], Result]] = {tuning.PLAIN: plain}
    if triton and x.dtype in {torch.float16, torch.bfloat16} and conv1x1.fits(x, len(weight)):
        ways = {**ways, **{tiling.name(): partial(fused, tiling) for tiling in tilings}}
    rows = x.numel() // x.shape[1]
    sizes = (
        1 << (rows - 1).bit_length(),
        x.shape[1],
        len(weight),
        *more,
    )  # so that a short last batch asks for nothing new
    return tuning.table().take(task, sizes, x, ways)


def _data_gradient(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return _convolution_backward(dy, x, weight, [True, False, False])[0]


def _convolution_backward(dy: Tensor, x: Tensor | None, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    of_input, of_weight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, wanted
    )
    return of_input, of_weight


class _Filter(NamedTuple):
    """How a 1x1 filter lies in memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> "_Filter":
        return cls(weight.shape, weight.stride(), weight.dtype)

    def gradient(self, values: Tensor) -> Tensor:
        """(K, C) or (K, C, 1, 1), row by row in memory, as the filter's own; DDP wants equal strides."""
        matrix = values.reshape(self.shape[:2]).to(self.dtype)
        in_rows = self.stride[:2] == (self.shape[1], 1)
        return matrix.as_strided(self.shape, self.stride) if in_rows else matrix.view(self.shape)
