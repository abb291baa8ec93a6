# mypy: ignore-errors
"""Triton kernel of RMSprop warm-up. Only `megabatch.optim.kernels.rmsprop` loads it, for a step on a GPU.

    u = g + beta w;   n = mu2 n + (1 - mu2) u^2
    v = m v + (share + (1 - share) (rmsprop_lr / lr) / (sqrt(n) + eps)) u;   w -= lr v

The equations in plain PyTorch: `rmsprop_step_reference`.
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
    OPTIONS,
    POINTERS,
    SCALE,
    SIZE,
    STATE,
    STATE_2,
    WEIGHT,
    read,
    value,
    write,
)

SHARE = tl.constexpr(5)  # a column of VALUES
RMSPROP_LR, MEAN_DECAY, EPS = (tl.constexpr(column) for column in range(3))  # of OPTIONS


@triton.jit
def update_kernel(
    pointers,
    facts,
    chunk_tensors,
    option_table,
    values,
    chunk: tl.constexpr,
    block: tl.constexpr,
    weight_type: tl.constexpr,
    gradient_type: tl.constexpr,
    copy_type: tl.constexpr,
    aligned: tl.constexpr,
):
    """Mean squares, momentum and weights of one chunk per program."""
    program = tl.program_id(0)
    tensor = tl.load(chunk_tensors + program)
    fact = facts + tensor * FACTS
    group = tl.load(fact + GROUP)
    if value(values, group, FOUND_INF) == 0:
        size = tl.load(fact + SIZE)
        lr, momentum, share = value(values, group, LR), value(values, group, MOMENTUM), value(values, group, SHARE)
        decay, scale = value(values, group, DECAY), value(values, group, SCALE)
        option_row = option_table + group * OPTIONS
        mean_decay, eps = tl.load(option_row + MEAN_DECAY), tl.load(option_row + EPS)
        adaptive = 0.0  # RMSprop's part, relative to lr; 0 at lr = 0, where it would be infinite
        if lr > 0:
            adaptive = (1.0 - share) * tl.load(option_row + RMSPROP_LR) / lr
        row = pointers + tensor * POINTERS
        offset = (program - tl.load(fact + FIRST_CHUNK)) * chunk
        if offset + chunk <= size:  # a full chunk needs no masks
            _update_chunk(row, offset, size, lr, momentum, decay, scale, share, adaptive, mean_decay, eps,
                          chunk, block, weight_type, gradient_type, copy_type, aligned, True)  # fmt: skip
        else:
            _update_chunk(row, offset, size, lr, momentum, decay, scale, share, adaptive, mean_decay, eps,
                          chunk, block, weight_type, gradient_type, copy_type, aligned, False)  # fmt: skip


@triton.jit
def _update_chunk(
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
    full: tl.constexpr,
):
    """Updates n, v and w of one chunk. Once the share of SGD is 1, n is neither read nor written."""
    weight, gradient = tl.load(row + WEIGHT), tl.load(row + GRADIENT)
    buffer, square, copy = tl.load(row + STATE), tl.load(row + STATE_2), tl.load(row + COPY)
    for part in range(0, chunk, block):
        w = read(weight, offset + part, size, block, weight_type, aligned, full)
        g = read(gradient, offset + part, size, block, gradient_type, aligned, full)
        v = read(buffer, offset + part, size, block, tl.float32, aligned, full)
        u = scale * g + decay * w
        v = momentum * v
        if share < 1:  # the same for a whole group, so the branch does not diverge
            n = read(square, offset + part, size, block, tl.float32, aligned, full)
            n = mean_decay * n + (1 - mean_decay) * (u * u)
            write(square, offset + part, size, n, block, tl.float32, aligned, full)
            v += share * u + adaptive * (u / (tl.sqrt(n) + eps))
        else:
            v += u
        w -= lr * v
        write(buffer, offset + part, size, v, block, tl.float32, aligned, full)
        write(weight, offset + part, size, w, block, weight_type, aligned, full)
        if copy != 0:  # rounds from w in registers, so the copy costs no load
            write(copy, offset + part, size, w, block, copy_type, aligned, full)
