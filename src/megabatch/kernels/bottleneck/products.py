"""The matrix products of a bottleneck's 1x1 convolutions: by torch between passes, or by a kernel of `conv1x1`.

Which is faster is measured once per shape (`megabatch.kernels.tuning`). Inputs that no kernel supports go to torch.
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
"""Name of the candidate in which both gradients of a convolution apply a deferred norm backward as they read dy."""


def run_fastest(
    task: str,
    x: Tensor,
    weight: Tensor,
    plain: Callable[..., Result],
    fused: Callable[..., Result],
    tilings: tuple[Tiling, ...],
    *,
    triton: bool,
    extra_sizes: tuple[int, ...] = (),
    sink: StatisticsSink | None = None,
) -> Result:
    """Result of the fastest candidate: `plain` (torch's convolution between passes), or `fused` in one of its tilings.

    `sink` is passed only to the call whose result is returned, so that timing runs do not add to statistics.
    `extra_sizes` tell apart problems of one shape in the tuning table.
    """
    # Every table has the plain candidate: it runs where nothing is measured, as on a CPU or during graph capture.
    candidates: Mapping[str, Callable[..., Result]] = {tuning.PLAIN: plain}
    if _has_kernel(x, weight, triton=triton):
        candidates = {**candidates, **{tiling.name(): partial(fused, tiling) for tiling in tilings}}
    sizes = (*_sizes(x, weight), *extra_sizes)
    fastest = candidates[tuning.table().choose(task, sizes, x, candidates)]
    return fastest() if sink is None else fastest(sink=sink)


def _has_kernel(x: Tensor, weight: Tensor, *, triton: bool) -> bool:
    return triton and x.dtype in {torch.float16, torch.bfloat16} and conv1x1.supports(x, len(weight))


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    rows = x.numel() // x.shape[1]
    # Rows rounded up to a power of two, so that a short last batch does not start new measurements.
    return 1 << (rows - 1).bit_length(), x.shape[1], len(weight)


def run_with_deferred(
    task: str,
    x: Tensor,
    weight: Tensor,
    dy: Tensor,
    deferred: DeferredNormBackward | None,
    gradients: Callable[[Tensor, DeferredNormBackward | None], Result],
    *,
    span: int,
    triton: bool,
) -> Result:
    """`gradients` of dy and `deferred`, by the faster candidate.

    Either a separate pass applies `deferred` to dy first, or `gradients` receives both, and each of its kernels applies
    `deferred` to dy as it reads it.
    """
    if deferred is None:
        return gradients(dy, None)

    def apart() -> Result:
        return gradients(deferred.apply(dy, span=span, triton=triton), None)

    candidates = {tuning.PLAIN: apart}
    if _has_kernel(x, weight, triton=triton):
        candidates[TOGETHER] = partial(gradients, dy, deferred)
    return tuning.table().run_fastest(task, _sizes(x, weight), x, candidates)


def data_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, deferred: DeferredNormBackward | None, *, span: int, triton: bool
) -> Tensor:
    """Gradient of the input x of torch's 1x1 convolution; `deferred`, if any, is applied to dy first."""
    whole_dy = dy if deferred is None else deferred.apply(dy, span=span, triton=triton)
    return _convolution_backward(whole_dy, x, weight, [True, False, False])[0]


def weight_gradient(
    task: str,
    dy: Tensor,
    x: Tensor,
    norm: Normalisation | None,
    weight_cast: Tensor,
    h: Tensor | None,
    layout: "FilterLayout",
    deferred: DeferredNormBackward | None,
    span: int,
    triton: bool,
) -> Tensor:
    """Gradient of the filter of y = weight h, with h = relu(norm(x)), or h = x where `norm` is None.

    `h` is passed where it is in memory; otherwise it is computed from x again. `weight_cast` is the filter in x's
    dtype. The result has the dtype and strides of the parameter (`layout`). `deferred` is still to be applied to dy.
    """

    def plain() -> Tensor:
        assert norm is not None or h is not None
        given = passes.normalise(x, norm, span=span, triton=triton) if h is None and norm is not None else h
        whole_dy = dy if deferred is None else deferred.apply(dy, span=span, triton=triton)
        return _convolution_backward(whole_dy, given, weight_cast, [False, True, False])[1]

    def fused(tiling: Tiling) -> Tensor:
        return conv1x1.conv1x1_weight_gradient(
            dy, x, span=span, normalisation=norm, deferred=deferred, dtype=layout.dtype, tiling=tiling, backend="triton"
        )

    tilings = tuple(t if deferred is None else t.with_deferred() for t in conv1x1.WEIGHT_GRADIENT_TILINGS)
    flags = (int(h is not None), int(deferred is not None))  # the fastest candidate depends on both
    return layout.restore(run_fastest(task, x, weight_cast, plain, fused, tilings, triton=triton, extra_sizes=flags))


def _convolution_backward(dy: Tensor, x: Tensor | None, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    input_gradient, weight_gradient, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, wanted
    )
    return input_gradient, weight_gradient


class FilterLayout(NamedTuple):
    """Shape, strides and dtype of a 1x1 filter, which its gradient must have as well: DDP needs equal strides."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> "FilterLayout":
        """The layout of this filter (K, C, 1, 1)."""
        return cls(weight.shape, weight.stride(), weight.dtype)

    def restore(self, values: Tensor) -> Tensor:
        """The gradient (K, C) or (K, C, 1, 1) in this layout."""
        matrix = values.reshape(self.shape[:2]).to(self.dtype)
        # In a 1x1 filter the strides of the last two axes are free, but differ between memory formats.
        in_rows = self.stride[:2] == (self.shape[1], 1)
        return matrix.as_strided(self.shape, self.stride) if in_rows else matrix.view(self.shape)
