"""Passes of a residual join, forward and backward: batch norm, residual sum and ReLU; without autograd.

With h = (x - mean) rstd as in `passes`:

    z  = relu(weight h + bias + r)
    dz = dy + addend where z > 0;   dr = dz

The residual r is a tensor, or the batch norm of a tensor by statistics of its own, where a shortcut has a convolution.
In the latter case the join reads that convolution's output, and one pass computes the sums of both batch norms.

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
    residual_norm: Normalisation | None = None,
    relu: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Returns `(z, relu_mask)`: one read of x and of the residual, and one write. Without `relu` the mask is None."""
    if not triton:
        return _join_reference(x, norm, residual, residual_norm, span, relu)
    cut, rows = passes.cut_rows(x.shape, span), rows_of(x)
    z = torch.empty_like(rows)
    relu_mask = rows.new_empty(_bits_shape(x) if relu else (0,), dtype=torch.uint8)
    with on_device(x):
        load("kernels.norm._join_triton").join_kernel[cut.tiles()](
            rows,
            rows_of(residual),
            z,
            relu_mask,
            *norm.in_rows(),
            # Without a second norm the kernel does not read these pointers, but they must point somewhere.
            *(residual_norm or norm).in_rows(),
            cut.num_rows,
            cut.span_rows,
            two_norms=residual_norm is not None,
            relu=relu,
            **cut.block(2),
        )
    return images_of(z, x), relu_mask if relu else None


def join_gradient(
    dy: Tensor,
    x: Tensor,
    norm: Normalisation,
    relu_mask: Tensor,
    *,
    span: int,
    triton: bool,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    residual_norm: Normalisation | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns `(dz, sums)`; sums is (spans, 2, C): of dz and of dz h over each span.

    With `residual_norm`, the batch norm of `residual`, sums is (spans, 4, C): x's two rows, then those of dz and of dz
    times the residual's h. `addend` is a second gradient of z, e.g. that of the next block's shortcut.
    """
    if not triton:
        return _join_gradient_reference(dy, x, norm, relu_mask, span, addend, residual, residual_norm)
    cut, rows, gradient = passes.cut_rows(x.shape, span), rows_of(x), rows_of(dy)
    dz = torch.empty_like(gradient)
    # With two norms, sums of dz h are needed for each h.
    num_sums = 2 if residual_norm is None else 4
    partials = rows.new_empty(cut.spans, cut.parts, num_sums, cut.columns, dtype=torch.float32)
    with on_device(x):
        load("kernels.norm._join_triton").join_gradient_kernel[cut.reductions()](
            gradient,
            gradient if addend is None else rows_of(addend),
            rows,
            rows if residual is None else rows_of(residual),
            relu_mask,
            dz,
            partials,
            *norm.in_rows()[:2],
            *(residual_norm or norm).in_rows()[:2],
            cut.num_rows,
            cut.span_rows,
            cut.rows_per_part,
            cut.parts,
            has_addend=addend is not None,
            two_norms=residual_norm is not None,
            **_gradient_block(cut, residual_norm),
        )
        return images_of(dz, x), passes.add_parts(partials)


def two_input_gradients(
    dz: Tensor,
    x: Tensor,
    norm: Normalisation,
    residual: Tensor,
    residual_norm: Normalisation,
    sums: Tensor,
    *,
    span: int,
    triton: bool,
) -> tuple[Tensor, Tensor]:
    """Returns `(dx, dresidual)` from sums (spans, 4, C): one read of dz, x and residual, one write of each."""
    # The reference runs the two batch norms one after the other.
    if not triton:
        pairs = ((x, norm, sums[:, :2]), (residual, residual_norm, sums[:, 2:]))
        dx, dresidual = (
            passes.input_gradient(dz, values, of_values, pair, span=span, triton=False, relu=False)
            for values, of_values, pair in pairs
        )
        return dx, dresidual
    cut, rows = passes.cut_rows(x.shape, span), rows_of(x)
    dx, dresidual = torch.empty_like(rows), torch.empty_like(rows)
    with on_device(x):
        load("kernels.norm._join_triton").two_input_gradients_kernel[cut.tiles()](
            rows_of(dz),
            rows,
            rows_of(residual),
            dx,
            dresidual,
            sums,
            *norm.in_rows()[:3],
            *residual_norm.in_rows()[:3],
            cut.num_rows,
            cut.span_rows,
            **cut.block(2),
        )
    return images_of(dx, x), images_of(dresidual, x)


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
    apart = (bits[:, :, None] >> torch.arange(8, device=bits.device)) & 1
    return images_of(apart.flatten(1)[:, : like.shape[1]].bool().contiguous(), like)


def _gradient_block(cut: passes.Cut, residual_norm: Normalisation | None) -> dict[str, int]:
    """Tile of the gradient kernel; half as high with two norms.

    Then each value has three running sums, and higher tiles would need so many registers that only one program fits on
    a multiprocessor.
    """
    return cut.block() if residual_norm is None else {**cut.block(), "block_rows": cut.block_rows // 2}


def _bits_shape(x: Tensor) -> tuple[int, int]:
    """Shape of `relu_mask`: (rows, bytes per row)."""
    return x.numel() // x.shape[1], -(-x.shape[1] // 8)


def _join_reference(
    x: Tensor, norm: Normalisation, residual: Tensor, residual_norm: Normalisation | None, span: int, relu: bool
) -> tuple[Tensor, Tensor | None]:
    added = passes.wide(residual) if residual_norm is None else passes.affine(residual, residual_norm, span)
    total = passes.affine(x, norm, span) + added
    z = (torch.relu(total) if relu else total).to(x.dtype)
    return z, bits_of(z) if relu else None


def _join_gradient_reference(
    dy: Tensor,
    x: Tensor,
    norm: Normalisation,
    relu_mask: Tensor,
    span: int,
    addend: Tensor | None,
    residual: Tensor | None,
    residual_norm: Normalisation | None,
) -> tuple[Tensor, Tensor]:
    # Rounded to dy's dtype, as autograd rounds the sum of two gradients.
    given = dy if addend is None else (passes.wide(dy) + passes.wide(addend)).to(dy.dtype)
    dz = torch.where(images_of_bits(relu_mask, x), given, 0.0)
    sums = passes.sums_over_spans(dz, x, norm, span)
    if residual is None or residual_norm is None:
        return dz, sums
    return dz, torch.cat([sums, passes.sums_over_spans(dz, residual, residual_norm, span)], dim=1)
