"""Gradient communication dtype: casting, scaling and error feedback.

Akiba et al. 2017 (arXiv:1711.04325) and Mikami et al. 2018 (arXiv:1811.05233) halve the bytes by using half precision
for communication only: the sums are cast back to fp32 before anything is computed from them.
"""

import torch
from torch import Tensor

from megabatch.errors import SettingsError

WIRE_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def wire_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype of a wire; raises SettingsError if `name` is unknown."""
    if name not in WIRE_DTYPES:
        raise SettingsError(f"wire {name!r} is unknown, needed one of {', '.join(WIRE_DTYPES)}; for example 'bf16'")
    return WIRE_DTYPES[name]


FP16_MAX = 65504.0
FP16_SUM_MAX = 0.99 * FP16_MAX  # N values clipped to 1/N of this have a finite sum, for any order of rounding
TARGET_PEAK = 64.0  # target for a bucket's largest scaled mean gradient: 1,000 times below fp16's overflow
MAX_GROWTH = 4.0  # largest factor between a scale and the next step's
MAX_SCALE = 2.0**24


class WireScale:
    """Per-bucket power of two that multiplies gradients before the cast to fp16 and divides the result.

        next scale = min(2^floor(log2(64 / peak)), 4 * scale)        peak = largest magnitude of the reduced bucket

    Means over many ranks are small: fp16 loses digits below 6e-5 and everything below 6e-8, and LARS gives layers with
    small gradients the same weight as others. The peak is that of the previous step's result, which is the same on all
    ranks: they agree without communication, and on a GPU without synchronisation. Growth is limited because the next
    gradient may be larger; `pack` clips values that exceed the range.
    """

    def __init__(self) -> None:
        self._scales: dict[int, Tensor] = {}

    def of(self, index: int, device: torch.device) -> Tensor:
        """Returns the scale of bucket `index`, a 0-d tensor on `device`; 1 before the first result."""
        if index not in self._scales:
            self._scales[index] = torch.ones((), device=device)
        self._scales[index] = self._scales[index].to(device)
        return self._scales[index]

    def learn(self, index: int, reduced: Tensor) -> None:
        """Sets the next scale of bucket `index` from its reduced values [n]; non-finite values divide it by 16."""
        scale = self.of(index, reduced.device)
        peak = torch.linalg.vector_norm(reduced, torch.inf, dtype=torch.float32)
        wanted = torch.exp2(torch.floor(torch.log2(TARGET_PEAK / peak)))
        grown = torch.minimum(wanted, MAX_GROWTH * scale).clamp(1 / MAX_SCALE, MAX_SCALE)
        scale.copy_(torch.where(peak.isfinite(), grown, scale / 16))  # in place: a CUDA graph reads this address

    def state_dict(self) -> dict[int, float]:
        """Returns the scales by bucket index, for a checkpoint; the same on all ranks."""
        return {index: float(scale) for index, scale in self._scales.items()}

    def load_state_dict(self, kept: dict[int, float]) -> None:
        """Restores the scales of `state_dict`; an empty one resets them."""
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
    """Writes `scale * share * source` [n] to `packed` [>= n] in the wire type, then zeros. Overwrites `source`.

    `share` is the 1 / N of the mean: division before the sum keeps fp16 sums below fp16's maximum, 65504. `limit` clips
    the magnitude of finite values; if any value is not finite, all become NaN, so that the training loop detects it.
    With `residual` [n, fp32] this rank's casting error is kept and added to the next call's source (error feedback:
    Seide et al. 2014, 1-bit SGD; Karimireddy et al. 2019, arXiv:1901.09847):

        v = share * g + e;    sent = cast(scale * v);    e = v - sent / scale

    Rounding inside the collective is not fed back. Non-finite residuals become zero, so that an overflow does not
    affect later steps.
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
    """Writes `factor * packed[:n]` to `target` [n] in the target's type; `packed` may be `target` itself."""
    if packed.data_ptr() != target.data_ptr():
        target.copy_(packed[: target.numel()])
    if isinstance(factor, Tensor) or factor != 1.0:
        target.mul_(factor)
