"""How a bottleneck's 1x1 convolutions are computed: by torch between passes, or by a kernel of `conv1x1`.

Which is faster is measured for each shape (`tuning`); what a kernel cannot take is torch's.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from megabatch.kernels import tuning
from megabatch.kernels.bottleneck import conv1x1
from megabatch.kernels.bottleneck.handover import DeferredNormBackward
from megabatch.kernels.bottleneck.tiles import Tiling
from megabatch.kernels.norm import passes
from megabatch.kernels.norm.passes import Normalisation
from megabatch.kernels.statistics import StatisticsSink

Result = TypeVar("Result")
TOGETHER = "together"
"""The way in which both gradients of a convolution apply a batch norm's backward to what they read."""


def take(
    task: str,
    x: Tensor,
    weight: Tensor,
    plain: Callable[..., Result],
    fused: Callable[..., Result],
    tilings: tuple[Tiling, ...],
    *,
    triton: bool,
    more: tuple[int, ...] = (),
    sink: StatisticsSink | None = None,
) -> Result:
    """The result of the faster: torch's convolution between passes, or a kernel in one of its tilings.

    `sink` is given to the call whose result is returned, and not to those that are timed: these leave nothing behind.
    """
    ways: Mapping[str, Callable[..., Result]] = {tuning.PLAIN: plain}
    if _can_take(x, weight, triton=triton):
        ways = {**ways, **{tiling.name(): partial(fused, tiling) for tiling in tilings}}
    sizes = (*_sizes(x, weight), *more)
    chosen = ways[tuning.table().choose(task, sizes, x, ways)]
    return chosen() if sink is None else chosen(sink=sink)


def _can_take(x: Tensor, weight: Tensor, *, triton: bool) -> bool:
    return triton and x.dtype in {torch.float16, torch.bfloat16} and conv1x1.fits(x, len(weight))


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    rows = x.numel() // x.shape[1]
    return 1 << (rows - 1).bit_length(), x.shape[1], len(weight)  # so that a short last batch asks for nothing new


def apart_or_together(
    task: str,
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    rest: DeferredNormBackward | None,
    gradients: Callable[[Tensor, DeferredNormBackward | None], Result],
    *,
    span: int,
    triton: bool,
) -> Result:
    """The `gradients` of dy after the rest of a batch norm's backward, or of dy and that rest: whichever is faster."""
    if rest is None:
        return gradients(dy, None)

    def apart() -> Result:
        return gradients(rest.applied(dy, span=span, triton=triton), None)

    ways = {tuning.PLAIN: apart}
    if _can_take(x, weight, triton=triton):
        ways[TOGETHER] = partial(gradients, dy, rest)
    return tuning.table().run_fastest(task, _sizes(x, weight), x, ways)


def data_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, rest: DeferredNormBackward | None, *, span: int, triton: bool
) -> Tensor:
    """Of torch's 1x1 convolution of x; dy may still need `rest`."""
    whole = dy if rest is None else rest.applied(dy, span=span, triton=triton)
    return _convolution_backward(whole, x, weight, [True, False, False])[0]


def weight_gradient(
    task: str,
    dy: Tensor,
    x: Tensor,
    norm: Normalisation | None,
    small: Tensor,
    h: Tensor | None,
    own: "Filter",
    rest: DeferredNormBackward | None,
    span: int,
    triton: bool,
) -> Tensor:
    """Of the convolution whose input is x, normalised by `norm`; `h` is that input where it is in memory.

    As its filter, which may be wider than `small`, with which it computes, lies in memory. dy may still need `rest`.
    """

    def plain() -> Tensor:
        assert norm is not None or h is not None
        given = passes.normalise(x, norm, span=span, triton=triton) if h is None and norm is not None else h
        whole = dy if rest is None else rest.applied(dy, span=span, triton=triton)
        return _convolution_backward(whole, given, small, [False, True, False])[1]

    def fused(tiling: Tiling) -> Tensor:
        return conv1x1.conv1x1_weight_gradient(
            dy, x, span=span, normalisation=norm, rest=rest, dtype=own.dtype, tiling=tiling, backend="triton"
        )

    tilings = tuple(t if rest is None else t.beside_rest() for t in conv1x1.WEIGHT_GRADIENT_TILINGS)
    found = take(task, x, small, plain, fused, tilings, triton=triton, more=(int(h is not None), int(rest is not None)))
    return own.gradient(found)


def _convolution_backward(dy: Tensor, x: Tensor | None, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    of_input, of_weight, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, wanted
    )
    return of_input, of_weight


class Filter(NamedTuple):
    """How a 1x1 filter lies in memory."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> "Filter":
        return cls(weight.shape, weight.stride(), weight.dtype)

    def gradient(self, values: Tensor) -> Tensor:
        """(K, C) or (K, C, 1, 1), row by row in memory, as the filter's own; DDP wants equal strides."""
        matrix = values.reshape(self.shape[:2]).to(self.dtype)
        in_rows = self.stride[:2] == (self.shape[1], 1)
        return matrix.as_strided(self.shape, self.stride) if in_rows else matrix.view(self.shape)
