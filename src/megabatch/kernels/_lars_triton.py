# mypy: ignore-errors
"""Triton kernels of the LARS step. Loaded by `lars` alone, when a step runs on a GPU."""

import triton
import triton.language as tl

# Tables that `lars_tables` fills: row lengths, then columns.
POINTERS = tl.constexpr(4)  # int64, one row per tensor
WEIGHT, GRADIENT, BUFFER, COPY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
FACTS = tl.constexpr(4)  # int64, one row per tensor
SIZE, GROUP, FIRST_CHUNK, NORM_CHUNKS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SETTINGS = tl.constexpr(8)  # float32, one row per group
ETA, EPS, INSIDE, CORRECTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SUM, UPDATE, CLIP, NESTEROV = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
VALUES = tl.constexpr(5)  # int64, one row per group: where these are in memory, so that a CUDA graph reads them anew
LR, MOMENTUM, DECAY, PREVIOUS_LR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SCALE = tl.constexpr(4)


@triton.jit
def _read(base, offset, size, block: tl.constexpr, kind: tl.constexpr, aligned: tl.constexpr, whole: tl.constexpr):
    """`block` values from `offset` on, in float32; zeros past `size`, which a whole block does not reach."""
    pointer = base.to(tl.pointer_type(kind))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    index = offset + tl.arange(0, block)
    if whole:
        return tl.load(pointer + index).to(tl.float32)
    return tl.load(pointer + index, mask=index < size, other=0.0).to(tl.float32)


@triton.jit
def _write(
    base, offset, size, values, block: tl.constexpr, kind: tl.constexpr, aligned: tl.constexpr, whole: tl.constexpr
):
    pointer = base.to(tl.pointer_type(kind))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    index = offset + tl.arange(0, block)
    if whole:
        tl.store(pointer + index, values.to(kind))
    else:
        tl.store(pointer + index, values.to(kind), mask=index < size)


@triton.jit
def _value(values, group, column: tl.constexpr):
    return tl.load(tl.load(values + group * VALUES + column).to(tl.pointer_type(tl.float32)))


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
    """Squared norms per chunk; the programs past the last chunk settle one group's rate and momentum each."""
    program = tl.program_id(0)
    if program < num_chunks:
        tensor = tl.load(owners + program)
        fact = facts + tensor * FACTS
        group = tl.load(fact + GROUP)
        size = tl.load(fact + SIZE)
        offset = (program - tl.load(fact + FIRST_CHUNK)) * chunk
        decay = _value(values, group, DECAY) * tl.load(settings + group * SETTINGS + UPDATE)
        scale = _value(values, group, SCALE)
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
        _settle(settings, values, scratch, program - num_chunks)


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
        w = _read(weight, offset + part, size, block, weight_type, aligned, whole)
        g = _read(gradient, offset + part, size, block, gradient_type, aligned, whole)
        u = scale * g + decay * w
        of_weight += w * w
        of_other += u * u
    return tl.sum(of_weight, axis=0), tl.sum(of_other, axis=0)


@triton.jit
def _settle(settings, values, scratch, group):
    """Puts a group's lr, momentum and decay where the update reads them; corrects the momentum, remembers the lr.

    Here and not in the update, where one program would overwrite the previous lr while others read it.
    """
    lr = _value(values, group, LR)
    momentum = _value(values, group, MOMENTUM)
    if tl.load(settings + group * SETTINGS + CORRECTED) > 0:
        previous = _value(values, group, PREVIOUS_LR)
        if previous > 0:
            momentum = momentum * (lr / previous)
        tl.store(tl.load(values + group * VALUES + PREVIOUS_LR).to(tl.pointer_type(tl.float32)), lr)
    tl.store(scratch + group * VALUES + LR, lr)
    tl.store(scratch + group * VALUES + MOMENTUM, momentum)
    tl.store(scratch + group * VALUES + DECAY, _value(values, group, DECAY))
    tl.store(scratch + group * VALUES + SCALE, _value(values, group, SCALE))


@triton.jit
def _norm(partials, count, block: tl.constexpr):
    """Square root of `count` partial sums, added in one order."""
    total = tl.zeros((block,), dtype=tl.float32)
    for start in range(0, count, block):
        index = start + tl.arange(0, block)
        total += tl.load(partials + index, mask=index < count, other=0.0)
    return tl.sqrt(tl.sum(total, axis=0))


@triton.jit
def _rate(partials, setting, count, num_chunks, lr, decay, block: tl.constexpr):
    """lr * trust ratio of one tensor; lr alone where it does not adapt (count 0) or a norm is 0."""
    rate = lr
    if count > 0:
        of_weight = _norm(partials, count, block)
        of_other = _norm(partials + num_chunks, count, block)
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
    scratch,
    partials,
    num_norm_chunks,
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
    first = tl.load(fact + FIRST_CHUNK)
    size = tl.load(fact + SIZE)
    group = tl.load(fact + GROUP)
    setting = settings + group * SETTINGS
    settled = scratch + group * VALUES
    lr, momentum, decay = tl.load(settled + LR), tl.load(settled + MOMENTUM), tl.load(settled + DECAY)
    scale = tl.load(settled + SCALE)
    rate = _rate(partials + first, setting, tl.load(fact + NORM_CHUNKS), num_norm_chunks, lr, decay, norm_block)
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
    buffer, copy = tl.load(row + BUFFER), tl.load(row + COPY)
    for part in range(0, chunk, block):
        w = _read(weight, offset + part, size, block, weight_type, aligned, whole)
        g = _read(gradient, offset + part, size, block, gradient_type, aligned, whole)
        v = _read(buffer, offset + part, size, block, tl.float32, aligned, whole)
        u = before * (scale * g + decay * w)
        v = momentum * v + u
        w -= after * tl.where(nesterov > 0, u + momentum * v, v)
        _write(buffer, offset + part, size, v, block, tl.float32, aligned, whole)
        _write(weight, offset + part, size, w, block, weight_type, aligned, whole)
        if copy != 0:
            _write(copy, offset + part, size, w, block, copy_type, aligned, whole)
