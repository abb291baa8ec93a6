# mypy: ignore-errors
"""Shared parts of the optimizers' Triton kernels: table columns, loads, stores, norms from partial sums.

A launch updates tensors of all groups. Each tensor is cut into chunks of `CHUNK` elements (the last one shorter), and
one program handles one chunk. A program finds its tensor by `chunk_tensors[program]`, the tensor's addresses in the
table `pointers`, its size and group in `facts`, and the group's numbers in `option_table` and `values`.
"""

import triton
import triton.language as tl

# Tables, filled by `megabatch.optim.kernels.tables`: row lengths, then the columns that all optimizers share.
POINTERS = tl.constexpr(5)  # int64, one row per tensor: addresses; COPY is 0 without a 16-bit copy
WEIGHT, GRADIENT, COPY, STATE, STATE_2 = (tl.constexpr(column) for column in range(5))
FACTS = tl.constexpr(4)  # int64, one row per tensor; NORM_CHUNKS is 0 if it does not adapt
SIZE, GROUP, FIRST_CHUNK, NORM_CHUNKS = (tl.constexpr(column) for column in range(4))
OPTIONS = tl.constexpr(8)  # float32, one row per group
# Addresses of rates, not rates: a replayed CUDA graph then reads the present values.
VALUES = tl.constexpr(7)  # int64, one row per group
LR, MOMENTUM, DECAY, SCALE, FOUND_INF = (tl.constexpr(column) for column in range(5))


@triton.jit
def read(base, offset, size, block: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr, full: tl.constexpr):
    """`block` values from `offset` on, as float32, with zeros past `size`; `full` promises that none is past it."""
    pointer = base.to(tl.pointer_type(dtype))
    if aligned:  # allows loads and stores of 16 bytes
        pointer = tl.multiple_of(pointer, 16)
    index = offset + tl.arange(0, block)
    if full:
        return tl.load(pointer + index).to(tl.float32)
    return tl.load(pointer + index, mask=index < size, other=0.0).to(tl.float32)


@triton.jit
def write(
    base, offset, size, values, block: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr, full: tl.constexpr
):
    """Stores `values` from `offset` on, up to `size`, rounded to the tensor's dtype."""
    pointer = base.to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    index = offset + tl.arange(0, block)
    if full:
        tl.store(pointer + index, values.to(dtype))
    else:
        tl.store(pointer + index, values.to(dtype), mask=index < size)


@triton.jit
def value(values, group, column: tl.constexpr):
    """A rate of a group, loaded from the address in the table."""
    return tl.load(tl.load(values + group * VALUES + column).to(tl.pointer_type(tl.float32)))


@triton.jit
def norm(partials, count, block: tl.constexpr):
    """Square root of the sum of `count` partial sums, added in a fixed order, so that equal inputs give equal bits."""
    total = tl.zeros((block,), dtype=tl.float32)
    for start in range(0, count, block):
        index = start + tl.arange(0, block)
        total += tl.load(partials + index, mask=index < count, other=0.0)
    return tl.sqrt(tl.sum(total, axis=0))
