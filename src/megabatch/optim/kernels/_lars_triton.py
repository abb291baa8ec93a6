# mypy: ignore-errors
"""Triton kernels of the LARS and SGD step. Loaded by `lars` alone, when a step runs on a GPU."""

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
    VALUES,
    WEIGHT,
    norm,
    read,
    value,
    write,
)

PREVIOUS_LR = tl.constexpr(5)  # a column of VALUES
ETA, EPS, INSIDE, CORRECTED, SUM, UPDATE, CLIP, NESTEROV = (tl.constexpr(column) for column in range(8))  # of SETTINGS


@triton.jit
def norms_kernel(
    pointers,
    facts,
    owners,
    settings,
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
    """Squared norms per chunk; the programs past the last such chunk settle one group's rate and momentum each."""
    program = tl.program_id(0)
    if program < num_norm_chunks:
        tensor = tl.load(owners + program)
        fact = facts + tensor * FACTS
        group = tl.load(fact + GROUP)
        size = tl.load(fact + SIZE)
        offset = (program - tl.load(fact + FIRST_CHUNK)) * chunk
        decay = value(values, group, DECAY) * tl.load(settings + group * SETTINGS + UPDATE)
        scale = value(values, group, SCALE)
        row = pointers + tensor * POINTERS
        if offset + chunk <= size:
            of_weight, of_other = _squares(
                row, offset, size, decay, scale, chunk, block, weight_type, gradient_type, aligned, True
            )
        else:
            of_weight, of_other = _squares(
                row, offset, size, decay, scale, chunk, block, weight_type, gradient_type, aligned, False
            )
        tl.store(partials + program, of_weight)
        tl.store(partials + num_chunks + program, of_other)
    else:
        _settle(settings, values, scratch, program - num_norm_chunks)


@triton.jit
def _squares(
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
    whole: tl.constexpr,
):
    """Sums of w^2 and (scale g + decay w)^2 over one chunk, each added as one tree."""
    weight, gradient = tl.load(row + WEIGHT), tl.load(row + GRADIENT)
    of_weight = tl.zeros((block,), dtype=tl.float32)
    of_other = tl.zeros((block,), dtype=tl.float32)
    for part in tl.static_range(0, chunk, block):
        w = read(weight, offset + part, size, block, weight_type, aligned, whole)
        g = read(gradient, offset + part, size, block, gradient_type, aligned, whole)
        u = scale * g + decay * w
        of_weight += w * w
        of_other += u * u
    return tl.sum(of_weight, axis=0), tl.sum(of_other, axis=0)


@triton.jit
def _settle(settings, values, scratch, group):
    """Puts a group's lr and momentum where the update reads them; corrects the momentum, remembers the lr.

    Here and not in the update, where one program would overwrite the previous lr while others read it.
    """
    lr = value(values, group, LR)
    momentum = value(values, group, MOMENTUM)
    if tl.load(settings + group * SETTINGS + CORRECTED) > 0:
        previous = value(values, group, PREVIOUS_LR)
        if previous > 0:
            momentum = momentum * (lr / previous)
        if value(values, group, FOUND_INF) == 0:
            tl.store(tl.load(values + group * VALUES + PREVIOUS_LR).to(tl.pointer_type(tl.float32)), lr)
    tl.store(scratch + group * VALUES + LR, lr)
    tl.store(scratch + group * VALUES + MOMENTUM, momentum)


@triton.jit
def _rate(partials, setting, count, num_chunks, lr, decay, block: tl.constexpr):
    """lr * trust ratio of one tensor; lr alone where it does not adapt (count 0) or a norm is 0."""
    rate = lr
    if count > 0:
        of_weight = norm(partials, count, block)
        of_other = norm(partials + num_chunks, count, block)
        if (of_weight > 0) & (of_other > 0):
            below = of_other + tl.load(setting + SUM) * decay * of_weight + tl.load(setting + EPS)
            ratio = tl.load(setting + ETA) * of_weight / below
            if tl.load(setting + CLIP) > 0:
                ratio = tl.minimum(ratio / lr, 1.0)
            rate = lr * ratio
    return rate


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
    settled: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
    norm_block: tl.constexpr,
    weight_type: tl.constexpr,
    gradient_type: tl.constexpr,
    copy_type: tl.constexpr,
    aligned: tl.constexpr,
):
    """Trust ratio, momentum and weights of one chunk."""
    program = tl.program_id(0)
    tensor = tl.load(owners + program)
    fact = facts + tensor * FACTS
    group = tl.load(fact + GROUP)
    if value(values, group, FOUND_INF) == 0:
        first, size = tl.load(fact + FIRST_CHUNK), tl.load(fact + SIZE)
        setting = settings + group * SETTINGS
        if settled:
            lr, momentum = tl.load(scratch + group * VALUES + LR), tl.load(scratch + group * VALUES + MOMENTUM)
        else:
            lr, momentum = value(values, group, LR), value(values, group, MOMENTUM)
        decay, scale = value(values, group, DECAY), value(values, group, SCALE)
        rate = _rate(partials + first, setting, tl.load(fact + NORM_CHUNKS), num_chunks, lr, decay, norm_block)
        inside = tl.load(setting + INSIDE)
        before = inside * rate + (1.0 - inside)
        after = inside + (1.0 - inside) * rate
        nesterov = tl.load(setting + NESTEROV)
        row = pointers + tensor * POINTERS
        offset = (program - first) * chunk
        if offset + chunk <= size:
            _move(row, offset, size, momentum, decay, scale, before, after, nesterov, chunk, block,
                  weight_type, gradient_type, copy_type, aligned, True)  # fmt: skip
        else:
            _move(row, offset, size, momentum, decay, scale, before, after, nesterov, chunk, block,
                  weight_type, gradient_type, copy_type, aligned, False)  # fmt: skip


@triton.jit
def _move(
    row,
    offset,
    size,
    momentum,
    decay,
    scale,
    before,
    after,
    nesterov,
    chunk: tl.constexpr,
    block: tl.constexpr,
    weight_type: tl.constexpr,
    gradient_type: tl.constexpr,
    copy_type: tl.constexpr,
    aligned: tl.constexpr,
    whole: tl.constexpr,
):
    """v = m v + before u and w -= after d over one chunk; d is v or, with nesterov, before u + m v."""
    weight, gradient = tl.load(row + WEIGHT), tl.load(row + GRADIENT)
    buffer, copy = tl.load(row + STATE), tl.load(row + COPY)
    for part in range(0, chunk, block):
        w = read(weight, offset + part, size, block, weight_type, aligned, whole)
        g = read(gradient, offset + part, size, block, gradient_type, aligned, whole)
        v = read(buffer, offset + part, size, block, tl.float32, aligned, whole)
        u = before * (scale * g + decay * w)
        v = momentum * v + u
        w -= after * tl.where(nesterov > 0, u + momentum * v, v)
        write(buffer, offset + part, size, v, block, tl.float32, aligned, whole)
        write(weight, offset + part, size, w, block, weight_type, aligned, whole)
        if copy != 0:
            write(copy, offset + part, size, w, block, copy_type, aligned, whole)
