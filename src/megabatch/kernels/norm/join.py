"""The passes of a residual join, forward and backward: batch norm, a sum and ReLU; no autograd.

With h = (x - mean) rstd as in `norm_passes`:

    z  = relu(weight h + bias + r)
    dz = dy + addend where z > 0;   dr = dz

The residual r is a tensor, or, where a shortcut's convolution is behind it, batch norm of a tensor by statistics of
that tensor's own; then the join reads what the convolution wrote, and the sums of both batch norms come from one pass.
Where ReLU passes is kept as bits, which are a sixteenth of the output that would tell the same: uint8 (rows, C / 8,
rounded up), bit i of byte j for channel 8 j + i.
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
    """`(z, passed)`: one read of x and of the residual, one write; where ReLU passes, or None without it."""
    if not triton:
        return _join_reference(x, norm, residual, residual_norm, span, relu)
    cut, rows = passes.cut(x.shape, span), rows_of(x)
    z = torch.empty_like(rows)
    passed = rows.new_empty(_bits_shape(x) if relu else (0,), dtype=torch.uint8)
    with on_device(x):
        load("kernels.norm._join_triton").join_kernel[cut.tiles()](
            rows,
            rows_of(residual),
            z,
            passed,
            *norm.in_rows(),
            *(residual_norm or norm).in_rows(),
            cut.num_rows,
            cut.span_rows,
            two_norms=residual_norm is not None,
            relu=relu,
            **cut.block(2),
        )
    return images_of(z, x), passed if relu else None


def join_gradient(
    dy: Tensor,
    x: Tensor,
    norm: Normalisation,
    passed: Tensor,
    *,
    span: int,
    triton: bool,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    residual_norm: Normalisation | None = None,
) -> tuple[Tensor, Tensor]:
    """`(dz, sums)`, with the sums of dz and of dz h over each span, (spans, 2, C).

    With a `residual_norm` of `residual` sums is (spans, 4, C): x's, then those of dz and of dz times the residual's h.
    """
    if not triton:
        return _join_gradient_reference(dy, x, norm, passed, span, addend, residual, residual_norm)
    cut, rows, gradient = passes.cut(x.shape, span), rows_of(x), rows_of(dy)
    dz = torch.empty_like(gradient)
    num_sums = 2 if residual_norm is None else 4
    partials = rows.new_empty(cut.spans, cut.parts, num_sums, cut.columns, dtype=torch.float32)
    with on_device(x):
        load("kernels.norm._join_triton").join_gradient_kernel[cut.reductions()](
            gradient,
            gradient if addend is None else rows_of(addend),
            rows,
            rows if residual is None else rows_of(residual),
            passed,
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
    """`(dx, dresidual)` through both batch norms, from sums (spans, 4, C): one read of dz, x and residual each."""
    if not triton:
        pairs = ((x, norm, sums[:, :2]), (residual, residual_norm, sums[:, 2:]))
        dx, dresidual = (
            passes.input_gradient(dz, values, own, pair, span=span, triton=False, relu=False)
            for values, own, pair in pairs
        )
        return dx, dresidual
    cut, rows = passes.cut(x.shape, span), rows_of(x)
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
    """Where these images are not 0 or below, as bits; where they are not a number too, as ReLU hides none."""
    rows = rows_of(~(images <= 0))
    num_bytes = -(-rows.shape[1] // 8)
    whole = torch.nn.functional.pad(rows, (0, 8 * num_bytes - rows.shape[1])).view(len(rows), num_bytes, 8)
    return (whole << torch.arange(8, device=rows.device)).sum(2).to(torch.uint8)


def images_of_bits(bits: Tensor, like: Tensor) -> Tensor:
    """The inverse of `bits_of`: bool, of the shape of `like`."""
    apart = (bits[:, :, None] >> torch.arange(8, device=bits.device)) & 1
    return images_of(apart.flatten(1)[:, : like.shape[1]].bool().contiguous(), like)


def _gradient_block(cut: passes.Cut, residual_norm: Normalisation | None) -> dict[str, int]:
    """Half as high with two norms: with three sums a value, more would take the registers of a second program."""
    return cut.block() if residual_norm is None else {**cut.block(), "block_rows": cut.block_rows // 2}


def _bits_shape(x: Tensor) -> tuple[int, int]:
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
    passed: Tensor,
    span: int,
    addend: Tensor | None,
    residual: Tensor | None,
    residual_norm: Normalisation | None,
) -> tuple[Tensor, Tensor]:
    given = dy if addend is None else (passes.wide(dy) + passes.wide(addend)).to(dy.dtype)
    dz = torch.where(images_of_bits(passed, x), given, 0.0)
    sums = passes.sums_over_spans(dz, x, norm, span)
    if residual is None or residual_norm is None:
        return dz, sums
    return dz, torch.cat([sums, passes.sums_over_spans(dz, residual, residual_norm, span)], dim=1)
