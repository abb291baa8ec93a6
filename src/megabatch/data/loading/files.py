"""Reads the files of a chunk of samples into memory, for calls that take all of them at once."""

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabatch.data.sources.protocol import EncodedSource
from megabatch.errors import DataError

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]


@dataclass(frozen=True)
class Files:
    """n files in memory, at `addresses` [n] and of `num_bytes` [n]. A file that could not be read is empty."""

    addresses: UInt64
    num_bytes: UInt64
    owner: NDArray[np.uint8] | list[bytes]  # all files behind each other, or one by one

    def file(self, row: int) -> bytes:
        """Returns the bytes of one file."""
        if isinstance(self.owner, list):
            return self.owner[row]
        return ctypes.string_at(int(self.addresses[row]), int(self.num_bytes[row]))

    def tensors(self) -> list[Tensor]:
        """Returns the files as uint8 tensors, [num_bytes] each; views of `owner` if that is one buffer, else copies."""
        block = self.owner
        if isinstance(block, list):  # numpy copies without the GIL
            block = np.concatenate([np.frombuffer(file, dtype=np.uint8) for file in block])
        return list(torch.split(torch.from_numpy(block), self.num_bytes.tolist()))


def read_files(source: EncodedSource, indices: Int64) -> Files:
    """Returns the files of these samples: read at once if the source can, else one by one."""
    read_many = getattr(source, "read_many", None)  # of `ReadsMany`
    if read_many is not None:
        try:
            block, starts = read_many(indices)
        except (DataError, OSError):  # of one of them: find it
            pass
        else:
            begins, sizes = starts[:-1].astype(np.uint64), np.diff(starts).astype(np.uint64)
            return Files(begins + np.uint64(block.ctypes.data), sizes, block)
    files = [_read_or_empty(source, index) for index in indices.tolist()]
    pointers = (ctypes.c_char_p * len(files))(*files)
    addresses = (
        np.frombuffer(memoryview(pointers).cast("B"), dtype=np.uint64) if files else np.empty(0, dtype=np.uint64)
    )
    return Files(addresses, np.fromiter(map(len, files), np.uint64, len(files)), files)


def _read_or_empty(source: EncodedSource, index: int) -> bytes:
    try:
        return source.read(index)
    except (DataError, OSError):
        return b""
