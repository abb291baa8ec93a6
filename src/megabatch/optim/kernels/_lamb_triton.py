# mypy: ignore-errors
"""Triton kernels of LAMB. Only `megabatch.optim.kernels.lamb` loads them, for a step on a GPU.

    m = beta1 m + (1 - beta1) g        n = beta2 n + (1 - beta2) g^2
    u = (m / (1 - beta1^t)) / (sqrt(n / (1 - beta2^t)) + eps) + decay w
    w -= lr (|w| / |u|) u

`norms_kernel` updates m and n and writes the squared norms of w and u of every chunk. `update_kernel` adds the squared
norms of a tensor's chunks, computes u again and updates w. The equations in plain PyTorch: `lamb_step_reference`.
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
    STATE_2,
    VALUES,
    WEIGHT,
    norm,
    read,
    value,
    write,
)

BETA2, STEP = tl.constexpr(5), tl.constexpr(6)  # columns of VALUES
EPS, CLIP = tl.constexpr(0), tl.constexpr(1)  # of OPTIONS
OFFSET, FACTOR = tl.constexpr(0), tl.constexpr(1)  # of the scratch table


@triton.jit
def norms_kernel(
    pointers,
    facts,
    chunk_tensors,
    option_table,
    values,
    scratch,
    partials,
    num_chunks,
    chunk: tl.constexpr,
    block: tl.constexpr,
    weight_type: tl.constexpr,
    gradient_type: tl.constexpr,
    aligned: tl.constexpr,
):
    """Moments and squared norms of one chunk per program.

    Each program past the last chunk writes the bias corrections of one group. The update launch reads the results,
    because its own programs increment the step count.
    """
    program = tl.program_id(0)
    if program < num_chunks:
        tensor = tl.load(chunk_tensors + program)
        fact = facts + tensor * FACTS
        group = tl.load(fact + GROUP)
        if value(values, group, FOUND_INF) == 0:  # skipped if a gradient overflowed
            size = tl.load(fact + SIZE)
            offset = (program - tl.load(fact + FIRST_CHUNK)) * chunk
            beta1, beta2 = value(values, group, MOMENTUM), value(values, group, BETA2)
            decay, scale = value(values, group, DECAY), value(values, group, SCALE)
            scaled_eps, factor = _corrections(option_table, values, group)
            row = pointers + tensor * POINTERS
            if offset + chunk <= size:  # a full chunk needs no masks
                weight_sum, update_sum = _update_moments(
                    row, offset, size, beta1, beta2, decay, scale, scaled_eps, factor, chunk, block,
                    weight_type, gradient_type, aligned, True,
                )  # fmt: skip
            else:
                weight_sum, update_sum = _update_moments(
                    row, offset, size, beta1, beta2, decay, scale, scaled_eps, factor, chunk, block,
                    weight_type, gradient_type, aligned, False,
                )  # fmt: skip
            # Two rows of the table: squared norms of weights, then of updates.
            tl.store(partials + program, weight_sum)
            tl.store(partials + num_chunks + program, update_sum)
    else:
        _write_corrections(option_table, values, scratch, program - num_chunks)


@triton.jit
def _write_corrections(option_table, values, scratch, group):
    """Writes a group's bias corrections to scratch memory."""
    scaled_eps, factor = _corrections(option_table, values, group)
    tl.store(scratch + group * VALUES + OFFSET, scaled_eps)
    tl.store(scratch + group * VALUES + FACTOR, factor)


@triton.jit
def _corrections(option_table, values, group):
    """eps c and c / c1, with c1 = 1 - beta1^t and c = sqrt(1 - beta2^t).

    Then u = (c / c1) m / (sqrt(n) + eps c) + decay w. In float64, since 1 - beta^t loses five of float32's seven digits
    for a beta near 1.
    """
    step = tl.load(_step_of(values, group)) + 1
    beta1 = value(values, group, MOMENTUM).to(tl.float64)
    beta2 = value(values, group, BETA2).to(tl.float64)
    root = tl.sqrt(1 - tl.exp(step * tl.log(beta2)))
    scaled_eps = tl.load(option_table + group * OPTIONS + EPS) * root
    return scaled_eps.to(tl.float32), (root / (1 - tl.exp(step * tl.log(beta1)))).to(tl.float32)


@triton.jit
def _step_of(values, group):
    """Address of the number of steps before this one, a float64."""
    return tl.load(values + group * VALUES + STEP).to(tl.pointer_type(tl.float64))


@triton.jit
def _update_moments(
    row,
    offset,
    size,
    beta1,
    beta2,
    decay,
    scale,
    scaled_eps,
    factor,
    chunk: tl.constexpr,
    block: tl.constexpr,
    weight_type: tl.constexpr,
    gradient_type: tl.constexpr,
    aligned: tl.constexpr,
    full: tl.constexpr,
):
    """Updates m and n of one chunk; returns the sums of w^2 and u^2, added in a fixed order."""
    weight, gradient = tl.load(row + WEIGHT), tl.load(row + GRADIENT)
    mean, square = tl.load(row + STATE), tl.load(row + STATE_2)
    weight_sum = tl.zeros((block,), dtype=tl.float32)
    update_sum = tl.zeros((block,), dtype=tl.float32)
    for part in range(0, chunk, block):
        w = read(weight, offset + part, size, block, weight_type, aligned, full)
        g = scale * read(gradient, offset + part, size, block, gradient_type, aligned, full)
        m = read(mean, offset + part, size, block, tl.float32, aligned, full)
        n = read(square, offset + part, size, block, tl.float32, aligned, full)
        # beta1 m + (1 - beta1) g, written as a difference to save a multiplication
        m += (1 - beta1) * (g - m)
        n = beta2 * n + (1 - beta2) * (g * g)
        write(mean, offset + part, size, m, block, tl.float32, aligned, full)
        write(square, offset + part, size, n, block, tl.float32, aligned, full)
        if not full:  # only the sum of u^2 needs this; past the end nothing is stored
            n = _one_past_end(n, offset + part, size, block)
        u = _update(w, m, n, decay, scaled_eps, factor)
        weight_sum += w * w
        update_sum += u * u
    return tl.sum(weight_sum, axis=0), tl.sum(update_sum, axis=0)


@triton.jit
def _one_past_end(n, offset, size, block: tl.constexpr):
    """n with 1 past the end of the tensor, where 0 / 0 would otherwise reach the norms if eps is 0."""
    return tl.where(offset + tl.arange(0, block) < size, n, 1.0)


@triton.jit
def _update(w, m, n, decay, scaled_eps, factor):
    """u, with the bias corrections in `factor` and `scaled_eps`; see `_corrections`."""
    return factor * (m / (tl.sqrt(n) + scaled_eps)) + decay * w


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
    chunk: tl.constexpr,
    block: tl.constexpr,
    norm_block: tl.constexpr,
    weight_type: tl.constexpr,
    copy_type: tl.constexpr,
    aligned: tl.constexpr,
):
    """Trust ratio of one chunk's tensor, then the weights of the chunk; one chunk per program.

    Each program past the last chunk counts the step of one group.
    """
    program = tl.program_id(0)
    if program < num_chunks:
        tensor = tl.load(chunk_tensors + program)
        fact = facts + tensor * FACTS
        group = tl.load(fact + GROUP)
        if value(values, group, FOUND_INF) == 0:
            # Every program of a tensor adds the same partial sums in the same order, so all get the same rate.
            first, size = tl.load(fact + FIRST_CHUNK), tl.load(fact + SIZE)
            clip = tl.load(option_table + group * OPTIONS + CLIP)
            count = tl.load(fact + NORM_CHUNKS)
            rate = _rate(partials + first, clip, count, num_chunks, value(values, group, LR), norm_block)
            decay = value(values, group, DECAY)
            scaled_eps, factor = tl.load(scratch + group * VALUES + OFFSET), tl.load(scratch + group * VALUES + FACTOR)
            row = pointers + tensor * POINTERS
            offset = (program - first) * chunk
            if offset + chunk <= size:
                _update_chunk(row, offset, size, rate, decay, scaled_eps, factor, chunk, block,
                              weight_type, copy_type, aligned, True)  # fmt: skip
            else:
                _update_chunk(row, offset, size, rate, decay, scaled_eps, factor, chunk, block,
                              weight_type, copy_type, aligned, False)  # fmt: skip
    else:
        _count_step(values, program - num_chunks)


@triton.jit
def _count_step(values, group):
    """Increments a group's step count, unless a gradient overflowed and the step is skipped."""
    if value(values, group, FOUND_INF) == 0:
        tl.store(_step_of(values, group), tl.load(_step_of(values, group)) + 1)


@triton.jit
def _rate(partials, clip, count, num_chunks, lr, block: tl.constexpr):
    """lr |w| / |u| of one tensor; lr if the tensor does not adapt (count 0) or a norm is 0."""
    rate = lr
    if count > 0:
        weight_norm = norm(partials, count, block)
        update_norm = norm(partials + num_chunks, count, block)
        if (weight_norm > 0) & (update_norm > 0):
            ratio = weight_norm / update_norm
            if clip > 0:
                ratio = tl.minimum(ratio, 1.0)
            rate = lr * ratio
    return rate


@triton.jit
def _update_chunk(
    row,
    offset,
    size,
    rate,
    decay,
    scaled_eps,
    factor,
    chunk: tl.constexpr,
    block: tl.constexpr,
    weight_type: tl.constexpr,
    copy_type: tl.constexpr,
    aligned: tl.constexpr,
    full: tl.constexpr,
):
    """w -= rate u over one chunk. u is computed again, since loading m and n costs less than storing and loading u."""
    weight, copy = tl.load(row + WEIGHT), tl.load(row + COPY)
    mean, square = tl.load(row + STATE), tl.load(row + STATE_2)
    for part in range(0, chunk, block):
        w = read(weight, offset + part, size, block, weight_type, aligned, full)
        m = read(mean, offset + part, size, block, tl.float32, aligned, full)
        n = read(square, offset + part, size, block, tl.float32, aligned, full)
        if not full:
            n = _one_past_end(n, offset + part, size, block)
        w -= rate * _update(w, m, n, decay, scaled_eps, factor)
        write(weight, offset + part, size, w, block, weight_type, aligned, full)
        if copy != 0:  # rounds from w in registers, so the copy costs no load
            write(copy, offset + part, size, w, block, copy_type, aligned, full)
