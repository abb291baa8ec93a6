"""Pool of reusable host memory for batches."""

import contextlib
import math
import mmap
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BLOCK_BYTES = 2 << 20  # a huge page; torch's allocator serves smaller tensors


class BufferPool:
    """Allocates tensors whose memory returns to the pool when the last tensor that uses it is freed.

    The C library returns large freed blocks to the operating system, which zeroes each page before it hands it out
    again. Writing to fresh memory therefore takes five times as long as writing to reused memory, longer than decoding
    a small crop. Views, and tensors saved for backward, keep their buffer in use, so it is never overwritten early.
    """

    def __init__(self, capacity: int) -> None:
        """Creates an empty pool, which keeps at most `capacity` unused buffers."""
        # A deque needs no lock, as its operations are atomic. A lock could deadlock: the garbage collector may return
        # a buffer in the thread that holds it.
        self._free: deque[mmap.mmap] = deque(maxlen=capacity)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised contiguous tensor, in pooled memory if it has 2 MiB or more."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < _BLOCK_BYTES:
            return torch.empty(tuple(shape), dtype=dtype)
        block = self._acquire(num_bytes)
        # The tensor keeps the array alive; the finalizer returns the block when the array is freed.
        lease = np.frombuffer(block, np.uint8, count=num_bytes)
        weakref.finalize(lease, self._free.append, block).atexit = False
        return torch.from_numpy(lease).view(dtype).view(tuple(shape))

    def _acquire(self, num_bytes: int) -> mmap.mmap:
        """Returns an unused block of a fitting size, or a new one."""
        for _ in range(len(self._free)):
            with contextlib.suppress(IndexError):  # another thread emptied the pool
                block = self._free.pop()  # the most recently used block is the most likely to be in a cache
                if num_bytes <= len(block) <= 2 * num_bytes + _BLOCK_BYTES:
                    return block
                self._free.appendleft(block)
        block = mmap.mmap(-1, -(-num_bytes // _BLOCK_BYTES) * _BLOCK_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                block.madvise(mmap.MADV_HUGEPAGE)
        return block
