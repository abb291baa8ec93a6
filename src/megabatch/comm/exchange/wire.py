"""The type in which gradients travel: cast before sending, cast back after, and what the cast lost, kept.

Half precision on the wire only is how Akiba et al. 2017 (arXiv:1711.04325) and Mikami et al. 2018 (arXiv:1811.05233)
halve the bytes; the sums go back to fp32 before anything is computed from them.
"""

from typing import Literal

import torch
from torch import Tensor

from megabatch.errors import SettingsError

WireName = Literal["fp32", "fp16", "bf16"]
WIRE_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WIRE_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


def wire_dtype(name: str) -> torch.dtype:
    """The torch type called `name`."""
    if name not in WIRE_DTYPES:
        raise SettingsError(f"wire {name!r} is unknown, needed one of {', '.join(WIRE_DTYPES)}; for example 'bf16'")
    return WIRE_DTYPES[name]


FP16_MAX = 65504.0
FP16_SUM_MAX = 0.99 * FP16_MAX  # the sum of N values clipped to an Nth of this stays finite, however it is rounded
TARGET_PEAK = 64.0  # where a bucket's largest mean gradient is put in fp16: 1,000 times below overflow
MAX_GROWTH = 4.0  # of a scale from one step to the next
MAX_SCALE = 2.0**24


class WireScale:
    """The power of two by which each bucket is multiplied before it is cast to fp16, and divided after.

        next scale = min(2^floor(log2(64 / peak)), 4 * scale)        peak = largest magnitude of the reduced bucket

    Means over large worlds are small: what is below 6e-5 loses digits in fp16 and below 6e-8 is lost, and LARS makes
    layers of small gradients count as much as others. The peak is that of the last step's result, which is the same
    on all ranks, so all agree without sending anything, and on a GPU nothing waits for it. Growth is slow because
    the next gradient may be larger; `pack` keeps what exceeds the range finite.
    """

    def __init__(self) -> None:
        self._scales: dict[int, Tensor] = {}

    def of(self, index: int, device: torch.device) -> Tensor:
        """The scale of bucket `index`, a 0-d tensor; 1 before its first result."""
        if index not in self._scales:
            self._scales[index] = torch.ones((), device=device)
        return self._scales[index].to(device)

    def learn(self, index: int, reduced: Tensor) -> None:
        """Choose the next scale of bucket `index` by its reduced values; a result that is not finite shrinks it."""
        scale = self.of(index, reduced.device)
        peak = torch.linalg.vector_norm(reduced, torch.inf, dtype=torch.float32)
        wanted = torch.exp2(torch.floor(torch.log2(TARGET_PEAK / peak)))
        grown = torch.minimum(wanted, MAX_GROWTH * scale).clamp(1 / MAX_SCALE, MAX_SCALE)
        self._scales[index] = torch.where(peak.isfinite(), grown, scale / 16)

    def state_dict(self) -> dict[int, float]:
        """The scales, to be kept with a checkpoint; equal on all ranks."""
        return {index: float(scale) for index, scale in self._scales.items()}

    def load_state_dict(self, kept: dict[int, float]) -> None:
        """Go on with kept scales."""
        self._scales = {index: torch.tensor(scale) for index, scale in kept.items()}


def pack(
    source: Tensor,
    packed: Tensor,
    *,
    share: float = 1.0,
    scale: float | Tensor = 1.0,
    limit: float | None = None,
    residual: Tensor | None = None,
) -> None:
    """Fill `packed` [>= n] with `scale * share * source` [n] in the wire's type, zeros after it; `source` is used up.

    `share` is the 1 / N of the mean: dividing before the sum keeps fp16 sums below its largest value, 65504.
    `limit` clips the magnitude of finite values; where one is not finite, all become NaN, for the trainer to see.
    With `residual` [n, fp32] the error of this rank's cast is kept there and added to the next call's source
    (error feedback: Seide et al. 2014, 1-bit SGD; Karimireddy et al. 2019, arXiv:1901.09847):

        v = share * g + e;    sent = cast(scale * v);    e = v - sent / scale

    What the collective loses by adding in the wire's type is not fed back. A residual that is not finite is dropped,
    so that one overflow does not poison the steps after it.
    """
    sent = packed[: source.numel()]
    packed[source.numel() :].zero_()
    if residual is None:
        _cast(source, sent, scale * share, limit)
        return
    residual.add_(source, alpha=share)
    source.copy_(residual)
    _cast(source, sent, scale, limit)
    residual.sub_(sent / scale).nan_to_num_(0.0, 0.0, 0.0)


def _cast(source: Tensor, sent: Tensor, factor: float | Tensor, limit: float | None) -> None:
    if limit is None:
        torch.mul(source, factor, out=sent)
        return
    finite = torch.linalg.vector_norm(source.mul_(factor), torch.inf).isfinite()
    sent.copy_(source.clamp_(-limit, limit))
    sent.add_(torch.where(finite, 0.0, torch.nan))  # clipping alone would turn an overflow into a large gradient


def unpack(packed: Tensor, target: Tensor, *, factor: float | Tensor = 1.0) -> None:
    """Write `factor * packed` to `target` [n] in the target's type, unless it is there already."""
    if packed.data_ptr() != target.data_ptr():
        target.copy_(packed[: target.numel()])
    if isinstance(factor, Tensor) or factor != 1.0:
        target.mul_(factor)
