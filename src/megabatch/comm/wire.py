"""The type in which gradients travel: cast before sending, cast back after, and what the cast lost, kept.

Half precision on the wire only is how Akiba et al. 2017 (arXiv:1711.04325) and Mikami et al. 2018 (arXiv:1811.05233)
halve the bytes; the sums go back to fp32 before anything is computed from them.
"""

from typing import Literal

import torch
from torch import Tensor

from megabatch.errors import SiteError

WireName = Literal["fp32", "fp16", "bf16"]
WIRE_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WIRE_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2}


def wire_dtype(name: str) -> torch.dtype:
    """The torch type called `name`."""
    if name not in WIRE_DTYPES:
        raise SiteError(f"wire {name!r} is unknown, needed one of {', '.join(WIRE_DTYPES)}; for example 'bf16'")
    return WIRE_DTYPES[name]


def pack(source: Tensor, packed: Tensor, *, factor: float, residual: Tensor | None = None) -> None:
    """Fill `packed` [>= n] with `factor * source` [n] in the wire's type, zeros after it.

    `factor` holds the 1 / N of the mean: dividing before the sum keeps fp16 sums below its largest value, 65504.
    With `residual` [n, fp32] the error of this rank's cast is kept there and added to the next call's source
    (error feedback: Seide et al. 2014, 1-bit SGD; Karimireddy et al. 2019, arXiv:1901.09847):

        v = factor * g + e;    sent = cast(v);    e = v - sent

    What the collective loses by adding in the wire's type is not fed back. A residual that is not finite is dropped,
    so that one overflow does not poison the steps after it.
    """
    numel = source.numel()
    if residual is None:
        torch.mul(source, factor, out=packed[:numel])
    else:
        residual.add_(source, alpha=factor)
        packed[:numel].copy_(residual)
        residual.sub_(packed[:numel]).nan_to_num_(0.0, 0.0, 0.0)
    packed[numel:].zero_()


def unpack(packed: Tensor, target: Tensor, *, factor: float) -> None:
    """Write `factor * packed` to `target` [n] in the target's type, unless it is there already."""
    if packed.data_ptr() != target.data_ptr():
        target.copy_(packed[: target.numel()])
    if factor != 1.0:
        target.mul_(factor)
