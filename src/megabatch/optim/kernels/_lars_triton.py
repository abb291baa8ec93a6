# mypy: ignore-errors
"""Triton kernels of LARS and momentum SGD. Only `megabatch.optim.kernels.lars` loads them, for a step on a GPU.

    u = g + beta w;   s = lr eta |w| / denominator, or lr
    v = m v + u, w -= s v      or, with the rate inside,      v = m v + s u, w -= v

`norms_kernel` writes the squared norms of every chunk and each group's lr and momentum. `update_kernel` adds the
squared norms of a tensor's chunks to s, and updates v and w. The equations in plain PyTorch: `lars_step_reference`.
"""

import triton
import triton.language as tl

from megabatch.optim.kernels._optimizer_triton import (
    COPY,
    DECAY,
    FACTS,
    FIRST_CHUNK,
    FOUND_INF,
    GRADIENT,
    GROUP,
    LR,
    MOMENTUM,
    NORM_CHUNKS,
    OPTIONS,
    POINTERS,
    SCALE,
    SIZE,
    STATE,
    VALUES,
    WEIGHT,
    norm,
    read,
    value,
    write,
)

PREVIOUS_LR = tl.constexpr(5)  # a column of VALUES
# Columns of OPTIONS; all but the first two are flags, 0 or 1.
ETA, EPS, INSIDE, CORRECTED, SUM, UPDATE, CLIP, NESTEROV = (tl.constexpr(column) for column in range(8))


@triton.jit
def norms_kernel(
    pointers,
    facts,
    chunk_tensors,
    option_table,
    values,
    scratch,
    partials,
    num_norm_chunks,
    num_chunks,
    chunk: tl.constexpr,
    block: tl.constexpr,
    weight_type: tl.constexpr,
    gradient_type: tl.constexpr,
    aligned: tl.constexpr,
):
    """Squared norms of one chunk per program. Each program past the last chunk prepares lr and momentum of one group.

    Only chunks of tensors that adapt have norms; they come first among all chunks.
    """
    program = tl.program_id(0)
    if program < num_norm_chunks:
        tensor = tl.load(chunk_tensors + program)
        fact = facts + tensor * FACTS
        group = tl.load(fact + GROUP)
        size = tl.load(fact + SIZE)
        offset = (program - tl.load(fact + FIRST_CHUNK)) * chunk
        # |g + beta w| for the denominator "update", else |g|
        decay = value(values, group, DECAY) * tl.load(option_table + group * OPTIONS + UPDATE)
        scale = value(values, group, SCALE)
        row = pointers + tensor * POINTERS
        if offset + chunk <= size:  # a full chunk needs no masks
            weight_sum, other_sum = _sums_of_squares(
                row, offset, size, decay, scale, chunk, block, weight_type, gradient_type, aligned, True
            )
        else:
            weight_sum, other_sum = _sums_of_squares(
                row, offset, size, decay, scale, chunk, block, weight_type, gradient_type, aligned, False
            )
        # Two rows of the table: squared norms of weights, then of gradients or u.
        tl.store(partials + program, weight_sum)
        tl.store(partials + num_chunks + program, other_sum)
    else:
        _prepare_group(option_table, values, scratch, program - num_norm_chunks)


@triton.jit
def _sums_of_squares(
    row,
    offset,
    size,
    decay,
    scale,
    chunk: tl.constexpr,
    block: tl.constexpr,
    weight_type: tl.constexpr,
    gradient_type: tl.constexpr,
    aligned: tl.constexpr,
    full: tl.constexpr,
):
    """Sums of w^2 and (scale g + decay w)^2 over one chunk, added in a fixed order."""
    weight, gradient = tl.load(row + WEIGHT), tl.load(row + GRADIENT)
    weight_sum = tl.zeros((block,), dtype=tl.float32)
    other_sum = tl.zeros((block,), dtype=tl.float32)
    for part in tl.static_range(0, chunk, block):
        w = read(weight, offset + part, size, block, weight_type, aligned, full)
        g = read(gradient, offset + part, size, block, gradient_type, aligned, full)
        u = scale * g + decay * w
        weight_sum += w * w
        other_sum += u * u
    return tl.sum(weight_sum, axis=0), tl.sum(other_sum, axis=0)


@triton.jit
def _prepare_group(option_table, values, scratch, group):
    """Writes a group's lr and corrected momentum to scratch memory and stores lr as the next step's previous lr.

    The update launch cannot do this: one program would overwrite the previous lr while others still read it.
    """
    lr = value(values, group, LR)
    momentum = value(values, group, MOMENTUM)
    if tl.load(option_table + group * OPTIONS + CORRECTED) > 0:
        previous = value(values, group, PREVIOUS_LR)
        if previous > 0:
            momentum = momentum * (lr / previous)
        if value(values, group, FOUND_INF) == 0:
            tl.store(tl.load(values + group * VALUES + PREVIOUS_LR).to(tl.pointer_type(tl.float32)), lr)
    tl.store(scratch + group * VALUES + LR, lr)
    tl.store(scratch + group * VALUES + MOMENTUM, momentum)


@triton.jit
def _rate(partials, option_row, count, num_chunks, lr, decay, block: tl.constexpr):
    """lr * trust ratio of one tensor; lr if the tensor does not adapt (count 0) or a norm is 0."""
    rate = lr
    if count > 0:
        weight_norm = norm(partials, count, block)
        other_norm = norm(partials + num_chunks, count, block)
        if (weight_norm > 0) & (other_norm > 0):
            denominator = other_norm + tl.load(option_row + SUM) * decay * weight_norm + tl.load(option_row + EPS)
            ratio = tl.load(option_row + ETA) * weight_norm / denominator
            if (tl.load(option_row + CLIP) > 0) & (ratio > 0):  # a ratio of 0 stays 0: at lr = 0 it would become 0 / 0
                ratio = tl.minimum(ratio / lr, 1.0)
            rate = lr * ratio
    return rate


@triton.jit
def update_kernel(
    pointers,
    facts,
    chunk_tensors,
    option_table,
    values,
    scratch,
    partials,
    num_chunks,
    prepared: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
    norm_block: tl.constexpr,
    weight_type: tl.constexpr,
    gradient_type: tl.constexpr,
    copy_type: tl.constexpr,
    aligned: tl.constexpr,
):
    """Trust ratio of one chunk's tensor, then momentum and weights of the chunk; one chunk per program."""
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensors + program)
    fact = facts + tensor * FACTS
    group = tl.load(fact + GROUP)
    if value(values, group, FOUND_INF) == 0:
        # Every program of a tensor adds the same partial sums in the same order, so all get the same rate.
        first, size = tl.load(fact + FIRST_CHUNK), tl.load(fact + SIZE)
        option_row = option_table + group * OPTIONS
        if prepared:  # by norms_kernel; without it lr and momentum need no correction
            lr, momentum = tl.load(scratch + group * VALUES + LR), tl.load(scratch + group * VALUES + MOMENTUM)
        else:
            lr, momentum = value(values, group, LR), value(values, group, MOMENTUM)
        decay, scale = value(values, group, DECAY), value(values, group, SCALE)
        rate = _rate(partials + first, option_row, tl.load(fact + NORM_CHUNKS), num_chunks, lr, decay, norm_block)
        # One of the two rates is s and the other 1, so that both forms share the code below.
        inside = tl.load(option_row + INSIDE)
        inner_rate = inside * rate + (1.0 - inside)
        outer_rate = inside + (1.0 - inside) * rate
        nesterov = tl.load(option_row + NESTEROV)
        lookahead = value(values, group, MOMENTUM)  # uncorrected: the buffer is already at this step's lr
        row = pointers + tensor * POINTERS
        offset = (program - first) * chunk
        if offset + chunk <= size:
            _update_chunk(row, offset, size, momentum, decay, scale, inner_rate, outer_rate, nesterov, lookahead,
                          chunk, block, weight_type, gradient_type, copy_type, aligned, True)  # fmt: skip
        else:
            _update_chunk(row, offset, size, momentum, decay, scale, inner_rate, outer_rate, nesterov, lookahead,
                          chunk, block, weight_type, gradient_type, copy_type, aligned, False)  # fmt: skip


@triton.jit
def _update_chunk(
    row,
    offset,
    size,
    momentum,
    decay,
    scale,
    inner_rate,
    outer_rate,
    nesterov,
    lookahead,
    chunk: tl.constexpr,
    block: tl.constexpr,
    weight_type: tl.constexpr,
    gradient_type: tl.constexpr,
    copy_type: tl.constexpr,
    aligned: tl.constexpr,
    full: tl.constexpr,
):
    """v = m v + inner_rate u and w -= outer_rate d over one chunk.

    d is v or, with nesterov, inner_rate u + lookahead v.
    """
    weight, gradient = tl.load(row + WEIGHT), tl.load(row + GRADIENT)
    buffer, copy = tl.load(row + STATE), tl.load(row + COPY)
    for part in range(0, chunk, block):
        w = read(weight, offset + part, size, block, weight_type, aligned, full)
        g = read(gradient, offset + part, size, block, gradient_type, aligned, full)
        v = read(buffer, offset + part, size, block, tl.float32, aligned, full)
        u = inner_rate * (scale * g + decay * w)
        v = momentum * v + u
        w -= outer_rate * tl.where(nesterov > 0, u + lookahead * v, v)
        write(buffer, offset + part, size, v, block, tl.float32, aligned, full)
        write(weight, offset + part, size, w, block, weight_type, aligned, full)
        if copy != 0:  # rounds from w in registers, so the copy costs no load
            write(copy, offset + part, size, w, block, copy_type, aligned, full)
