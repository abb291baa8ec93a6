# mypy: ignore-errors
"""Triton kernels of the algebra on filters in `fold`, which imports this module when one first runs.

Symbols are those of `kernels.gram`. `sums` (spans, w (w + 1)) holds h^T h, then 1^T h of each span; `g_sums`
(spans, K (w + 1)) holds g^T h, then 1^T g. w and K are multiples of the blocks. Values are float32; `folded` and
`correction` are 16-bit.
"""

import triton
import triton.language as tl

from megabatch.kernels._statistics_triton import _accumulate

PRECISION = tl.constexpr("tf32x3")
"""Three products of the tensor cores, which together have the accuracy of float32."""


@triton.jit
def _span_size(num_rows, span_rows):
    """Number of rows of this program's span."""
    return tl.minimum(num_rows - tl.program_id(1).to(tl.int64) * span_rows, span_rows)


@triton.jit
def fold_kernel(
    sums,
    weight,
    gamma,
    beta,
    folded,
    bias,
    rstd,
    filtered,
    h_mean,
    mean,
    var,
    num_rows,
    span_rows,
    eps,
    inputs,
    outputs,
    sink_a,
    sink_b,
    sink_count,
    momentum,
    sink_kind: tl.constexpr,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
):
    """V, b, q, W C and the statistics of y, for block_outputs channels of one span. Grid: (blocks, spans).

    weight (K, w); gamma, beta (K,); folded and filtered (spans, K, w); h_mean (spans, w); the others (spans, K). A sink
    (`_statistics_triton`) needs a single span.
    """
    span, output = tl.program_id(1), tl.program_id(0) * block_outputs + tl.arange(0, block_outputs)
    size = _span_size(num_rows, span_rows).to(tl.float64)
    second = sums + span * inputs * (inputs + 1)
    first = second + inputs * inputs
    matrix = span * outputs * inputs + output[:, None] * inputs  # this span's rows of (spans, K, w)
    y_mean = tl.zeros((block_outputs,), dtype=tl.float32)
    y_var = tl.zeros((block_outputs,), dtype=tl.float32)
    for first_column in range(0, inputs, block_inputs):
        column = first_column + tl.arange(0, block_inputs)
        # In float64, as the difference of two float32 values would round once more.
        column_mean = tl.load(first + column).to(tl.float64) / size
        product = tl.zeros((block_outputs, block_inputs), dtype=tl.float32)
        for first_row in range(0, inputs, block_inputs):
            row = first_row + tl.arange(0, block_inputs)
            row_mean = tl.load(first + row).to(tl.float64) / size
            covariance = tl.load(second + row[:, None] * inputs + column[None, :]).to(tl.float64) / size
            covariance -= row_mean[:, None] * column_mean[None, :]
            values = tl.load(weight + output[:, None] * inputs + row[None, :]).to(tl.float32)
            product = tl.dot(values, covariance.to(tl.float32), product, input_precision=PRECISION)
        values = tl.load(weight + output[:, None] * inputs + column[None, :]).to(tl.float32)
        y_mean += tl.sum(values * column_mean.to(tl.float32)[None, :], axis=1)
        y_var += tl.sum(values * product, axis=1)
        tl.store(filtered + matrix + column[None, :], product)
        if tl.program_id(0) == 0:
            tl.store(h_mean + span * inputs + column, column_mean.to(tl.float32))
    y_var = tl.maximum(y_var, 0.0, propagate_nan=tl.PropagateNan.ALL)
    # NaN, not 0, on overflow, as in the other batch norms.
    inv_std = tl.where(y_var < float("inf"), tl.rsqrt(y_var + eps), float("nan"))
    slope = tl.load(gamma + output) * inv_std
    shift = tl.load(beta + output)
    for first_column in range(0, inputs, block_inputs):
        column = first_column + tl.arange(0, block_inputs)
        values = tl.load(weight + output[:, None] * inputs + column[None, :]).to(tl.float32)
        rounded = (slope[:, None] * values).to(folded.dtype.element_ty)
        tl.store(folded + matrix + column[None, :], rounded)
        column_mean = (tl.load(first + column).to(tl.float64) / size).to(tl.float32)
        shift -= tl.sum(rounded.to(tl.float32) * column_mean[None, :], axis=1)
    vector = span * outputs + output
    tl.store(bias + vector, shift)
    tl.store(rstd + vector, inv_std)
    tl.store(mean + vector, y_mean)
    y_var *= (size / tl.maximum(size - 1, 1)).to(tl.float32)
    tl.store(var + vector, y_var)
    exists = output < outputs
    _accumulate(
        sink_a, sink_b, sink_count, momentum, sink_kind, y_mean, y_var, y_mean, y_var, 1, output, exists, outputs
    )


@triton.jit
def filter_gradient_kernel(
    g_sums,
    weight,
    gamma,
    rstd,
    filtered,
    h_mean,
    dweight,
    vectors,
    scale,
    num_rows,
    span_rows,
    inputs,
    outputs,
    block_outputs: tl.constexpr,
    block_inputs: tl.constexpr,
):
    """dW, dgamma and dbeta of each span, and gamma q^2 dgamma / N. Grid: (blocks of output channels, spans).

    dweight (spans, K, w); vectors (2, spans, K) holds dgamma, dbeta; scale (spans, K); others as in `fold_kernel`.
    """
    span, output = tl.program_id(1), tl.program_id(0) * block_outputs + tl.arange(0, block_outputs)
    size = _span_size(num_rows, span_rows).to(tl.float32)
    inv_std = tl.load(rstd + span * outputs + output)
    slope = tl.load(gamma + output) * inv_std
    product = g_sums + span * outputs * (inputs + 1)
    db = tl.load(product + outputs * inputs + output)
    dq = tl.zeros((block_outputs,), dtype=tl.float32)
    for first in range(0, inputs, block_inputs):
        column = first + tl.arange(0, block_inputs)
        place = output[:, None] * inputs + column[None, :]
        centred = tl.load(product + place) - db[:, None] * tl.load(h_mean + span * inputs + column)[None, :]
        dq += tl.sum(tl.load(weight + place).to(tl.float32) * centred, axis=1)
    target = dweight + span * outputs * inputs
    for first in range(0, inputs, block_inputs):
        column = first + tl.arange(0, block_inputs)
        place = output[:, None] * inputs + column[None, :]
        centred = tl.load(product + place) - db[:, None] * tl.load(h_mean + span * inputs + column)[None, :]
        centred -= (inv_std * inv_std * dq)[:, None] * tl.load(filtered + span * outputs * inputs + place)
        tl.store(target + place, (slope[:, None] * centred).to(dweight.dtype.element_ty))
    vector = span * outputs + output
    tl.store(vectors + vector, inv_std * dq)
    tl.store(vectors + tl.num_programs(1) * outputs + vector, db)
    tl.store(scale + vector, slope * inv_std * inv_std * dq / size)


@triton.jit
def correction_kernel(
    g_sums,
    weight,
    folded,
    h_mean,
    scale,
    correction,
    constant,
    num_rows,
    span_rows,
    inputs,
    outputs,
    block_inputs: tl.constexpr,
    block_rows: tl.constexpr,
    block_outputs: tl.constexpr,
):
    """-M and the constant row M m - V^T db / N of dh, for block_inputs channels of h. Grid: (blocks, spans).

    correction (spans, w, w), which is symmetric; constant (spans, w); others as in the kernels above.
    """
    span, column = tl.program_id(1), tl.program_id(0) * block_inputs + tl.arange(0, block_inputs)
    size = _span_size(num_rows, span_rows).to(tl.float32)
    db = g_sums + span * outputs * (inputs + 1) + outputs * inputs
    shift = tl.zeros((block_inputs,), dtype=tl.float32)
    for first_row in range(0, inputs, block_rows):
        row = first_row + tl.arange(0, block_rows)
        total = tl.zeros((block_inputs, block_rows), dtype=tl.float32)
        for first in range(0, outputs, block_outputs):
            output = first + tl.arange(0, block_outputs)
            left = tl.load(weight + output[:, None] * inputs + column[None, :]).to(tl.float32)
            left *= tl.load(scale + span * outputs + output)[:, None]
            right = tl.load(weight + output[:, None] * inputs + row[None, :]).to(tl.float32)
            total = tl.dot(left.T, right, total, input_precision=PRECISION)
        rounded = (-total).to(correction.dtype.element_ty)
        tl.store(correction + (span * inputs + column[:, None]) * inputs + row[None, :], rounded)
        shift -= tl.sum(rounded.to(tl.float32) * tl.load(h_mean + span * inputs + row)[None, :], axis=1)
    for first in range(0, outputs, block_outputs):
        output = first + tl.arange(0, block_outputs)
        values = tl.load(folded + (span * outputs + output[:, None]) * inputs + column[None, :]).to(tl.float32)
        shift -= tl.sum(values * tl.load(db + output)[:, None], axis=0) / size
    tl.store(constant + span * inputs + column, shift)
