"""Host memory for batches that is used again and again."""

import contextlib
import math
import mmap
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_BLOCK_BYTES = 2 << 20  # a huge page; smaller tensors are left to the ordinary allocator


class BufferPool:
    """Empty tensors over memory that comes back to the pool when the last tensor that uses it is gone.

    The C library returns large blocks to the system when they are freed, and the system hands each page out zeroed:
    writing to fresh memory costs five times as much as writing to memory that was used before, more than decoding a
    small crop. Views and tensors saved for backward keep a buffer in use, so nothing is overwritten too early.
    """

    def __init__(self, capacity: int) -> None:
        """Keep at most `capacity` unused buffers."""
        # A deque's own operations are atomic: a lock could be asked for again by a buffer that the garbage collector
        # gives back while it is held.
        self._free: deque[mmap.mmap] = deque(maxlen=capacity)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < _BLOCK_BYTES:
            return torch.empty(tuple(shape), dtype=dtype)
        block = self._take(num_bytes)
        lease = np.frombuffer(block, np.uint8, count=num_bytes)
        weakref.finalize(lease, self._free.append, block).atexit = False
        return torch.from_numpy(lease).view(dtype).view(tuple(shape))

    def _take(self, num_bytes: int) -> mmap.mmap:
        for _ in range(len(self._free)):
            with contextlib.suppress(IndexError):  # another thread took the last one
                block = self._free.pop()  # the latest is the likeliest to be in a cache
                if num_bytes <= len(block) <= 2 * num_bytes + _BLOCK_BYTES:
                    return block
                self._free.appendleft(block)
        block = mmap.mmap(-1, -(-num_bytes // _BLOCK_BYTES) * _BLOCK_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):
                block.madvise(mmap.MADV_HUGEPAGE)
        return block
