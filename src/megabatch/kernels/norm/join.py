"""Passes of a residual join, forward and backward: batch norm, residual sum and ReLU; without autograd.

With h = (x - mean) rstd as in `passes`:

    z  = relu(weight h + bias + r)
    dz = dy where z > 0;   dr = dz

`relu_mask` saves where z is positive or NaN as bits, a sixteenth of the size of a 16-bit z: uint8 (rows, ceil(C / 8)),
bit i of byte j for channel 8 j + i.
"""

import torch
from torch import Tensor

from megabatch.kernels.dispatch import load, on_device
from megabatch.kernels.layout import images_of, rows_of
from megabatch.kernels.norm import passes
from megabatch.kernels.norm.passes import Normalisation


def join(
    x: Tensor,
    norm: Normalisation,
    residual: Tensor,
    *,
    span: int,
    triton: bool,
    relu: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Returns `(z, relu_mask)`: one read of x and of the residual, and one write. Without `relu` the mask is None."""
    if not triton:
        return _join_reference(x, norm, residual, span, relu)
    cut, rows = passes.cut_rows(x.shape, span), rows_of(x)
    z = torch.empty_like(rows)
    relu_mask = rows.new_empty(bits_shape(x) if relu else (0,), dtype=torch.uint8)
    with on_device(x):
        load("kernels.norm._join_triton").join_kernel[cut.tiles()](
            rows,
            rows_of(residual),
            z,
            relu_mask,
            *norm.in_rows(),
            cut.num_rows,
            cut.span_rows,
            relu=relu,
            **cut.block(2),
        )
    return images_of(z, x), relu_mask if relu else None


def join_gradient(
    dy: Tensor, x: Tensor, norm: Normalisation, relu_mask: Tensor, *, span: int, triton: bool
) -> tuple[Tensor, Tensor]:
    """Returns `(dz, sums)`; sums is (spans, 2, C): of dz and of dz h over each span."""
    if not triton:
        dz = torch.where(images_of_bits(relu_mask, x), dy, 0.0)
        return dz, passes.sums_over_spans(dz, x, norm, span)
    cut, rows, gradient = passes.cut_rows(x.shape, span), rows_of(x), rows_of(dy)
    dz = torch.empty_like(gradient)
    partials = rows.new_empty(cut.spans, cut.parts, 2, cut.columns, dtype=torch.float32)
    with on_device(x):
        load("kernels.norm._join_triton").join_gradient_kernel[cut.reductions()](
            gradient,
            rows,
            relu_mask,
            dz,
            partials,
            *norm.in_rows()[:2],
            cut.num_rows,
            cut.span_rows,
            cut.rows_per_part,
            cut.parts,
            **cut.block(),
        )
        return images_of(dz, x), passes.add_parts(partials)


def bits_of(images: Tensor) -> Tensor:
    """ReLU mask of these images: a bit is 1 where a value is positive or NaN, since ReLU passes NaN on."""
    rows = rows_of(~(images <= 0))
    num_bytes = -(-rows.shape[1] // 8)
    # Channels are padded to whole bytes; each group of 8 is shifted to its bits and summed.
    whole = torch.nn.functional.pad(rows, (0, 8 * num_bytes - rows.shape[1])).view(len(rows), num_bytes, 8)
    return (whole << torch.arange(8, device=rows.device)).sum(2).to(torch.uint8)


def images_of_bits(bits: Tensor, like: Tensor) -> Tensor:
    """Inverse of `bits_of`: bool images of the shape of `like`."""
    # (rows, bytes, 8), one value per bit; surplus bits of the last byte are cut off.
    shifts = bits.new_ones(8).cumsum(0) - 1
    apart = (bits[:, :, None] >> shifts) & 1
    return images_of(apart.flatten(1)[:, : like.shape[1]].bool().contiguous(), like)


def bits_shape(x: Tensor) -> tuple[int, int]:
    """Shape of `relu_mask`: (rows, bytes per row)."""
    return x.numel() // x.shape[1], -(-x.shape[1] // 8)


def _join_reference(
    x: Tensor, norm: Normalisation, residual: Tensor, span: int, relu: bool
) -> tuple[Tensor, Tensor | None]:
    total = passes.affine(x, norm, span) + passes.wide(residual)
    z = (torch.relu(total) if relu else total).to(x.dtype)
    return z, bits_of(z) if relu else None
