"""Products of a bottleneck's matrices with what surrounds them: by Triton kernels or torch, without autograd.

A matrix has a row per pixel and a column per channel. Its rows are cut into spans of `span_rows` rows, of which the
last may be shorter. Kernels multiply 16-bit matrices, each with one fixed tiling per width; on a GPU the first product
of each kind is compared with torch's (`kernels.checked`).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megabatch.kernels.checked import checked
from megabatch.kernels.dispatch import load, on_device
from megabatch.kernels.norm.join import bits_shape, images_of_bits
from megabatch.kernels.norm.passes import add_parts, wide

_MOST_ROWS = 2**31  # the copy engine counts rows in 32 bits
PROGRAMS = 264
"""Programs of a sum over rows: two per multiprocessor of an H200."""
GRAM_TILES = {64: (64, 64, 64, 4, 4), 128: (64, 128, 128, 8, 4), 256: (64, 64, 256, 8, 4)}
"""Rows, outputs, inputs, warps and pipeline stages of `gram`, by input channels rounded up."""
PRODUCT_TILES = {64: (128, 64, 4, 4), 128: (128, 128, 8, 3)}
"""Rows, columns, warps and pipeline stages of `product`, by columns rounded up."""


class Term(NamedTuple):
    """One product a b: rows a (N, C) and a filter b per span, (spans, C, K)."""

    a: Tensor
    b: Tensor


class Epilogue(NamedTuple):
    """What follows a product in the same pass: relu(product + bias + addend), then 0 where `relu_mask` is not set.

    bias (spans, K) in the dtype of sums; addend (N, K). `relu_mask` is the output of another ReLU, or its bits
    (`norm.join`).
    """

    bias: Tensor | None = None
    addend: Tensor | None = None
    relu: bool = False
    relu_mask: Tensor | None = None


def supports(rows: Tensor, columns: int) -> bool:
    """True for 16-bit rows (N, C) and products of K columns, C and K multiples of 16."""
    # The copy engine needs rows whose size is a multiple of 16 bytes; tl.dot needs at least 16 channels.
    is_16_bit = rows.dtype in {torch.float16, torch.bfloat16}
    return is_16_bit and 0 < len(rows) < _MOST_ROWS and rows.shape[1] % 16 == 0 and columns % 16 == 0


def batches(span_rows: int, *matrices: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Whole spans as one batch (spans, rows, C), then the short span; of all matrices alike."""
    num_rows = len(matrices[0])
    whole = num_rows // span_rows
    end = whole * span_rows
    if whole or not num_rows:
        spans = max(1, whole)
        yield slice(0, spans), tuple(m[:end].view(spans, end // spans, m.shape[1]) for m in matrices)
    if end < num_rows:
        yield slice(whole, whole + 1), tuple(m[None, end:] for m in matrices)


def gram(a: Tensor, b: Tensor, *, span_rows: int, triton: bool) -> Tensor:
    """Returns a^T b, then 1^T a, of each span: (spans, K (w + 1)), for rows a (N, K) and b (N, w).

    Sums are float32, or float64 for float64 rows. Parts of a span are added in a fixed order: equal inputs give equal
    bits.
    """
    plain = partial(_gram_reference, a, b, span_rows)
    if not (triton and supports(a, b.shape[1])):
        return plain()
    return checked("gram", (a.shape[1], b.shape[1]), a, partial(_gram_kernel, a, b, span_rows), plain)


def product(
    term: Term, epilogue: Epilogue, *, span_rows: int, triton: bool, other: Term | None = None
) -> tuple[Tensor, Tensor | None]:
    """Returns epilogue(a b + other.a other.b), (N, K), and with ReLU a mask for later calls.

    Kernels round once and return bits; torch's operations round after each step and return the output itself.
    """
    plain = partial(_product_reference, term, other, epilogue, span_rows)
    bias, addend, relu, relu_mask = epilogue
    channels = [t.a.shape[1] for t in (term, other) if t is not None] + [term.b.shape[2]]
    is_known = relu_mask is None or relu_mask.dtype == torch.uint8
    if not (triton and is_known and all(supports(term.a, number) for number in channels)):
        return plain()
    sizes = (*channels, bias is not None, addend is not None, relu, relu_mask is not None)
    return checked("product", sizes, term.a, partial(_product_kernel, term, other, epilogue, span_rows), plain)


def masked(rows: Tensor, relu_mask: Tensor) -> Tensor:
    """The rows (N, K), 0 where ReLU passed nothing: `relu_mask` is ReLU's output or bits."""
    if relu_mask.dtype != torch.uint8:
        passed: Tensor = torch.ops.aten.threshold_backward(rows, relu_mask, 0)
        return passed
    return torch.where(images_of_bits(relu_mask, rows[:, :, None, None])[:, :, 0, 0], rows, 0)


def _gram_reference(a: Tensor, b: Tensor, span_rows: int) -> Tensor:
    parts = [
        torch.cat([(wide(g).mT @ wide(h)).flatten(1), wide(g).sum(1)], dim=1) for _, (g, h) in batches(span_rows, a, b)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _product_reference(
    term: Term, other: Term | None, epilogue: Epilogue, span_rows: int
) -> tuple[Tensor, Tensor | None]:
    bias, addend, relu, relu_mask = epilogue
    out = term.a.new_empty(len(term.a), term.b.shape[2])
    matrices = [term.a, out, *([] if addend is None else [addend]), *([] if other is None else [other.a])]
    for spans, (a, target, *rest) in batches(span_rows, *matrices):
        if addend is None:
            torch.bmm(a, term.b[spans], out=target)
        else:
            torch.baddbmm(rest[0], a, term.b[spans], out=target)
        if other is not None:
            target.baddbmm_(rest[-1], other.b[spans])
        if bias is not None:
            # Added in float32: rounded to 16 bit it would shift whole channels where the input is far from 0.
            target.add_(bias[spans, None])
    out = out if relu_mask is None else masked(out, relu_mask)
    out = out.relu_() if relu else out
    return out, out if relu else None


def _gram_kernel(a: Tensor, b: Tensor, span_rows: int) -> Tensor:
    (num_rows, outputs), inputs = a.shape, b.shape[1]
    rows, block_outputs, block_inputs, num_warps, num_stages = _tiles(GRAM_TILES, inputs)
    tiles, spans = -(-outputs // block_outputs) * -(-inputs // block_inputs), -(-num_rows // span_rows)
    # Few tiles of the product would leave most of the GPU idle, so each span's rows are cut into parts as well, but
    # none so small that its float32 sums are larger than its 16-bit rows.
    least_rows = max(rows, 2 * outputs * inputs // (outputs + inputs))
    parts = max(1, min(span_rows // least_rows, PROGRAMS // (tiles * spans)))
    rows_per_part = -(-span_rows // (parts * rows)) * rows
    parts = -(-span_rows // rows_per_part)
    partials = a.new_empty(spans, parts, 1, outputs * (inputs + 1), dtype=torch.float32)
    with on_device(a):
        load("kernels.bottleneck._product_triton").gram_kernel[(tiles, parts, spans)](
            _descriptor(a, rows, block_outputs),
            _descriptor(b, rows, block_inputs),
            partials,
            num_rows,
            span_rows,
            rows_per_part,
            parts,
            outputs,
            inputs,
            block_rows=rows,
            block_outputs=block_outputs,
            block_inputs=block_inputs,
            num_warps=num_warps,
            num_stages=num_stages,
        )
        return add_parts(partials)[:, 0]


def _product_kernel(term: Term, other: Term | None, epilogue: Epilogue, span_rows: int) -> tuple[Tensor, Tensor | None]:
    bias, addend, relu, relu_mask = epilogue
    a, b = term
    columns = b.shape[2]
    rows, block_columns, num_warps, num_stages = _tiles(PRODUCT_TILES, columns)
    out = a.new_empty(len(a), columns)
    written = a.new_empty(bits_shape(out), dtype=torch.uint8) if relu else None
    # A filter is read as it lies in memory: by its rows, or by those of its transpose.
    inner_major, pairs, blocks = b.is_contiguous(), [], []
    for left, right in (term, other or term):
        blocks.append(block_of(left.shape[1]))
        matrix = right.flatten(0, 1) if inner_major else right.mT.flatten(0, 1)
        shape = (blocks[-1], block_columns) if inner_major else (block_columns, blocks[-1])
        pairs += [_descriptor(left, rows, blocks[-1]), _descriptor(matrix, *shape)]
    given = relu_mask if relu_mask is not None else written
    grid = -(-columns // block_columns) * -(-span_rows // rows), -(-len(a) // span_rows)
    with on_device(a):
        load("kernels.bottleneck._product_triton").product_kernel[grid](
            *pairs,
            # What is not used must still point somewhere.
            out if bias is None else bias,
            out if addend is None else addend,
            out if given is None else given,
            out,
            len(a),
            span_rows,
            a.shape[1],
            (other or term).a.shape[1],
            inner_major=inner_major,
            has_other=other is not None,
            has_bias=bias is not None,
            has_addend=addend is not None,
            relu=relu,
            masked=relu_mask is not None,
            columns=columns,
            block_rows=rows,
            block_columns=block_columns,
            block_inner=blocks[0],
            other_block_inner=blocks[1],
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return out, written


def _tiles(table: dict[int, Any], width: int) -> Any:
    """Entry of the narrowest tile that covers `width` channels, else of the widest."""
    return table[min((key for key in table if key >= width), default=max(table))]


def block_of(channels: int) -> int:
    """Largest power of two up to 64 that divides `channels`: a block of a sum never reaches the next span's filter."""
    return min(64, channels & -channels)


def _descriptor(matrix: Tensor, block_rows: int, block_columns: int) -> Any:
    """Tensor descriptor for the GPU's copy engine (TMA), which reads blocks of the matrix and zeros outside it."""
    descriptors = load("kernels.bottleneck._product_triton").TensorDescriptor
    return descriptors.from_tensor(matrix.contiguous(), [block_rows, block_columns])
