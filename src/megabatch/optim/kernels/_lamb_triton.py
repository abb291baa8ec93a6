# mypy: ignore-errors
"""Triton kernels of the LAMB step. Loaded by `lamb` alone, when a step runs on a GPU."""

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
    POINTERS,
    SCALE,
    SETTINGS,
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
EPS, CLIP = tl.constexpr(0), tl.constexpr(1)  # of SETTINGS
OFFSET, FACTOR = tl.constexpr(0), tl.constexpr(1)  # of the scratch table


@triton.jit
def norms_kernel(
    pointers,
    facts,
    owners,
    settings,
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
    """Moments, and the squared norms of weights and update, of one chunk; past the last chunk, a group's corrections.

    The update launch reads those corrections: by then the step count itself may have moved on.
    """
    program = tl.program_id(0)
    if program < num_chunks:
        tensor = tl.load(owners + program)
        fact = facts + tensor * FACTS
        group = tl.load(fact + GROUP)
        if value(values, group, FOUND_INF) == 0:
            size = tl.load(fact + SIZE)
            offset = (program - tl.load(fact + FIRST_CHUNK)) * chunk
            beta1, beta2 = value(values, group, MOMENTUM), value(values, group, BETA2)
            decay, scale = value(values, group, DECAY), value(values, group, SCALE)
            below, factor = _corrections(settings, values, group)
            row = pointers + tensor * POINTERS
            if offset + chunk <= size:
                of_weight, of_update = _moments(row, offset, size, beta1, beta2, decay, scale, below, factor, chunk,
                                                block, weight_type, gradient_type, aligned, True)  # fmt: skip
            else:
                of_weight, of_update = _moments(row, offset, size, beta1, beta2, decay, scale, below, factor, chunk,
                                                block, weight_type, gradient_type, aligned, False)  # fmt: skip
            tl.store(partials + program, of_weight)
            tl.store(partials + num_chunks + program, of_update)
    else:
        _settle(settings, values, scratch, program - num_chunks)


@triton.jit
def _settle(settings, values, scratch, group):
    below, factor = _corrections(settings, values, group)
    tl.store(scratch + group * VALUES + OFFSET, below)
    tl.store(scratch + group * VALUES + FACTOR, factor)


@triton.jit
def _corrections(settings, values, group):
    """eps c and c / c1, with c = sqrt(c2): then u = (c / c1) m / (sqrt(n) + eps c) + decay w.

    In float64, since 1 - beta^t of a beta near 1 loses five of float32's seven digits.
    """
    time = tl.load(_step_of(values, group)) + 1
    beta1 = value(values, group, MOMENTUM).to(tl.float64)
    beta2 = value(values, group, BETA2).to(tl.float64)
    root = tl.sqrt(1 - tl.exp(time * tl.log(beta2)))
    below = tl.load(settings + group * SETTINGS + EPS) * root
    return below.to(tl.float32), (root / (1 - tl.exp(time * tl.log(beta1)))).to(tl.float32)


@triton.jit
def _step_of(values, group):
    return tl.load(values + group * VALUES + STEP).to(tl.pointer_type(tl.float64))


@triton.jit
def _moments(
    row,
    offset,
    size,
    beta1,
    beta2,
    decay,
    scale,
    below,
    factor,
    chunk: tl.constexpr,
    block: tl.constexpr,
    weight_type: tl.constexpr,
    gradient_type: tl.constexpr,
    aligned: tl.constexpr,
    whole: tl.constexpr,
):
    """Moves m and n over one chunk; sums of w^2 and u^2, each added as one tree."""
    weight, gradient = tl.load(row + WEIGHT), tl.load(row + GRADIENT)
    mean, square = tl.load(row + STATE), tl.load(row + STATE_2)
    of_weight = tl.zeros((block,), dtype=tl.float32)
    of_update = tl.zeros((block,), dtype=tl.float32)
    for part in range(0, chunk, block):
        w = read(weight, offset + part, size, block, weight_type, aligned, whole)
        g = scale * read(gradient, offset + part, size, block, gradient_type, aligned, whole)
        m = read(mean, offset + part, size, block, tl.float32, aligned, whole)
        n = read(square, offset + part, size, block, tl.float32, aligned, whole)
        m += (1 - beta1) * (g - m)
        n = beta2 * n + (1 - beta2) * (g * g)
        write(mean, offset + part, size, m, block, tl.float32, aligned, whole)
        write(square, offset + part, size, n, block, tl.float32, aligned, whole)
        if not whole:
            n = _not_zero_past(n, offset + part, size, block)
        u = _update(w, m, n, decay, below, factor)
        of_weight += w * w
        of_update += u * u
    return tl.sum(of_weight, axis=0), tl.sum(of_update, axis=0)


@triton.jit
def _not_zero_past(n, offset, size, block: tl.constexpr):
    """1 for what is past the end, where 0 / 0 would otherwise reach the norms if eps is 0."""
    return tl.where(offset + tl.arange(0, block) < size, n, 1.0)


@triton.jit
def _update(w, m, n, decay, below, factor):
    return factor * (m / (tl.sqrt(n) + below)) + decay * w


@triton.jit
def update_kernel(
    pointers,
    facts,
    owners,
    settings,
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
    """Trust ratio and weights of one chunk; the programs past the last chunk count one group's step each."""
    program = tl.program_id(0)
    if program < num_chunks:
        tensor = tl.load(owners + program)
        fact = facts + tensor * FACTS
        group = tl.load(fact + GROUP)
        if value(values, group, FOUND_INF) == 0:
            first, size = tl.load(fact + FIRST_CHUNK), tl.load(fact + SIZE)
            clip = tl.load(settings + group * SETTINGS + CLIP)
            count = tl.load(fact + NORM_CHUNKS)
            rate = _rate(partials + first, clip, count, num_chunks, value(values, group, LR), norm_block)
            decay = value(values, group, DECAY)
            below, factor = tl.load(scratch + group * VALUES + OFFSET), tl.load(scratch + group * VALUES + FACTOR)
            row = pointers + tensor * POINTERS
            offset = (program - first) * chunk
            if offset + chunk <= size:
                _move(row, offset, size, rate, decay, below, factor, chunk, block,
                      weight_type, copy_type, aligned, True)  # fmt: skip
            else:
                _move(row, offset, size, rate, decay, below, factor, chunk, block,
                      weight_type, copy_type, aligned, False)  # fmt: skip
    else:
        _count(values, program - num_chunks)


@triton.jit
def _count(values, group):
    """One step more, unless it was left out."""
    if value(values, group, FOUND_INF) == 0:
        tl.store(_step_of(values, group), tl.load(_step_of(values, group)) + 1)


@triton.jit
def _rate(partials, clip, count, num_chunks, lr, block: tl.constexpr):
    """lr |w| / |u| of one tensor; lr alone where it does not adapt (count 0) or a norm is 0."""
    rate = lr
    if count > 0:
        of_weight = norm(partials, count, block)
        of_update = norm(partials + num_chunks, count, block)
        if (of_weight > 0) & (of_update > 0):
            ratio = of_weight / of_update
            if clip > 0:
                ratio = tl.minimum(ratio, 1.0)
            rate = lr * ratio
    return rate


@triton.jit
def _move(
    row,
    offset,
    size,
    rate,
    decay,
    below,
    factor,
    chunk: tl.constexpr,
    block: tl.constexpr,
    weight_type: tl.constexpr,
    copy_type: tl.constexpr,
    aligned: tl.constexpr,
    whole: tl.constexpr,
):
    """w -= rate u over one chunk, u computed again: reading m and n costs less than writing and reading u."""
    weight, copy = tl.load(row + WEIGHT), tl.load(row + COPY)
    mean, square = tl.load(row + STATE), tl.load(row + STATE_2)
    for part in range(0, chunk, block):
        w = read(weight, offset + part, size, block, weight_type, aligned, whole)
        m = read(mean, offset + part, size, block, tl.float32, aligned, whole)
        n = read(square, offset + part, size, block, tl.float32, aligned, whole)
        if not whole:
            n = _not_zero_past(n, offset + part, size, block)
        w -= rate * _update(w, m, n, decay, below, factor)
        write(weight, offset + part, size, w, block, weight_type, aligned, whole)
        if copy != 0:
            write(copy, offset + part, size, w, block, copy_type, aligned, whole)
