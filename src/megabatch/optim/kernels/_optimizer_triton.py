# mypy: ignore-errors
"""What the Triton kernels of all optimizers share: the tables' columns, reading, writing, norms from partial sums."""

import triton
import triton.language as tl

# Tables that `optimizer_tables` fills: row lengths, then columns that mean the same everywhere.
POINTERS = tl.constexpr(5)  # int64, one row per tensor
WEIGHT, GRADIENT, COPY, STATE, STATE_2 = (tl.constexpr(column) for column in range(5))
FACTS = tl.constexpr(4)  # int64, one row per tensor
SIZE, GROUP, FIRST_CHUNK, NORM_CHUNKS = (tl.constexpr(column) for column in range(4))
SETTINGS = tl.constexpr(8)  # float32, one row per group
VALUES = tl.constexpr(7)  # int64, one row per group: where these are in memory, so that a CUDA graph reads them anew
LR, MOMENTUM, DECAY, SCALE, FOUND_INF = (tl.constexpr(column) for column in range(5))


@triton.jit
def read(base, offset, size, block: tl.constexpr, kind: tl.constexpr, aligned: tl.constexpr, whole: tl.constexpr):
    """`block` values from `offset` on, in float32; zeros past `size`, which a whole block does not reach."""
    pointer = base.to(tl.pointer_type(kind))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    index = offset + tl.arange(0, block)
    if whole:
        return tl.load(pointer + index).to(tl.float32)
    return tl.load(pointer + index, mask=index < size, other=0.0).to(tl.float32)


@triton.jit
def write(
    base, offset, size, values, block: tl.constexpr, kind: tl.constexpr, aligned: tl.constexpr, whole: tl.constexpr
):
    """The first `size - offset` of `values`, in the tensor's type."""
    pointer = base.to(tl.pointer_type(kind))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    index = offset + tl.arange(0, block)
    if whole:
        tl.store(pointer + index, values.to(kind))
    else:
        tl.store(pointer + index, values.to(kind), mask=index < size)


@triton.jit
def value(values, group, column: tl.constexpr):
    """A rate of a group, read where it is."""
    return tl.load(tl.load(values + group * VALUES + column).to(tl.pointer_type(tl.float32)))


@triton.jit
def norm(partials, count, block: tl.constexpr):
    """Square root of `count` partial sums, added in one order."""
    total = tl.zeros((block,), dtype=tl.float32)
    for start in range(0, count, block):
        index = start + tl.arange(0, block)
        total += tl.load(partials + index, mask=index < count, other=0.0)
    return tl.sqrt(tl.sum(total, axis=0))
