# mypy: ignore-errors
"""Triton kernel of RMSprop warm-up. Loaded by `rmsprop` alone, when a step runs on a GPU."""

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
    POINTERS,
    SCALE,
    SETTINGS,
    SIZE,
    STATE,
    STATE_2,
    WEIGHT,
    read,
    value,
    write,
)

SHARE = tl.constexpr(5)  # a column of VALUES
RMSPROP_LR, MEAN_DECAY, EPS = (tl.constexpr(column) for column in range(3))  # of SETTINGS


@triton.jit
def update_kernel(
    pointers,
    facts,
    owners,
    settings,
    values,
    chunk: tl.constexpr,
    block: tl.constexpr,
    weight_type: tl.constexpr,
    gradient_type: tl.constexpr,
    copy_type: tl.constexpr,
    aligned: tl.constexpr,
):
    """Mean squares, momentum and weights of one chunk."""
    program = tl.program_id(0)
    tensor = tl.load(owners + program)
    fact = facts + tensor * FACTS
    group = tl.load(fact + GROUP)
    if value(values, group, FOUND_INF) == 0:
        size = tl.load(fact + SIZE)
        lr, momentum, share = value(values, group, LR), value(values, group, MOMENTUM), value(values, group, SHARE)
        decay, scale = value(values, group, DECAY), value(values, group, SCALE)
        setting = settings + group * SETTINGS
        mean_decay, eps = tl.load(setting + MEAN_DECAY), tl.load(setting + EPS)
        adaptive = 0.0
        if lr > 0:
            adaptive = (1.0 - share) * tl.load(setting + RMSPROP_LR) / lr
        row = pointers + tensor * POINTERS
        offset = (program - tl.load(fact + FIRST_CHUNK)) * chunk
        if offset + chunk <= size:
            _move(row, offset, size, lr, momentum, decay, scale, share, adaptive, mean_decay, eps, chunk, block,
                  weight_type, gradient_type, copy_type, aligned, True)  # fmt: skip
        else:
            _move(row, offset, size, lr, momentum, decay, scale, share, adaptive, mean_decay, eps, chunk, block,
                  weight_type, gradient_type, copy_type, aligned, False)  # fmt: skip


@triton.jit
def _move(
    row,
    offset,
    size,
    lr,
    momentum,
    decay,
    scale,
    share,
    adaptive,
    mean_decay,
    eps,
    chunk: tl.constexpr,
    block: tl.constexpr,
    weight_type: tl.constexpr,
    gradient_type: tl.constexpr,
    copy_type: tl.constexpr,
    aligned: tl.constexpr,
    whole: tl.constexpr,
):
    """The step of one chunk; mean squares rest, neither read nor written, once the share of SGD is 1."""
    weight, gradient = tl.load(row + WEIGHT), tl.load(row + GRADIENT)
    buffer, square, copy = tl.load(row + STATE), tl.load(row + STATE_2), tl.load(row + COPY)
    for part in range(0, chunk, block):
        w = read(weight, offset + part, size, block, weight_type, aligned, whole)
        g = read(gradient, offset + part, size, block, gradient_type, aligned, whole)
        v = read(buffer, offset + part, size, block, tl.float32, aligned, whole)
        u = scale * g + decay * w
        v = momentum * v
        if share < 1:
            n = read(square, offset + part, size, block, tl.float32, aligned, whole)
            n = mean_decay * n + (1 - mean_decay) * (u * u)
            write(square, offset + part, size, n, block, tl.float32, aligned, whole)
            v += share * u + adaptive * (u / (tl.sqrt(n) + eps))
        else:
            v += u
        w -= lr * v
        write(buffer, offset + part, size, v, block, tl.float32, aligned, whole)
        write(weight, offset + part, size, w, block, weight_type, aligned, whole)
        if copy != 0:
            write(copy, offset + part, size, w, block, copy_type, aligned, whole)
