"""Reads files of plain tensors that may come from anyone: no code is run, and memory is bounded by the file's size."""

import pickle  # only its error class: torch.load raises it for what is not plain tensors
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from megabatch.errors import CheckpointError

_PLAIN = (int, float, str, bool, type(None))
_DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, OSError, EOFError, ValueError, TypeError, LookupError),
    *(RuntimeError, AttributeError, AssertionError, OverflowError, MemoryError, NotImplementedError),
)
"""What torch.load and zipfile raise for damaged files."""


def read_tensors(path: Path) -> dict[str, Any]:
    """The dict that `torch.save` wrote to `path`: dense tensors on the CPU, numbers, texts, lists and dicts.

    Raises:
        CheckpointError: the file is damaged, holds other objects, or needs more memory than its own size.
    """
    try:
        num_bytes = path.stat().st_size
        _refuse_compressed(path, num_bytes)
        state = torch.load(path, map_location="cpu", weights_only=True)
        _require_plain(state, num_bytes)
    except _DAMAGE as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"checkpoint {path.name} could not be read as plain tensors: {reason}") from error
    return dict(state)


def _refuse_compressed(path: Path, num_bytes: int) -> None:
    """torch stores tensors uncompressed; compressed or overlapping entries of the zip would be a decompression bomb."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("its entries are compressed")
    if sum(entry.file_size for entry in entries) > num_bytes:
        raise ValueError("its entries are larger than the file")


def _require_plain(state: Any, num_bytes: int) -> None:
    """Raises ValueError if anything in `state` is of another type, or a tensor larger than its file.

    Objects that are referenced several times are examined once: nested references could multiply without end.
    """
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, needed a dict")
    pending, seen = [state], set[int]()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            pending += value
        elif isinstance(value, torch.Tensor):
            _require_dense(value, num_bytes)
        elif not isinstance(value, _PLAIN):
            raise ValueError(f"it holds a {type(value).__name__}")


def _require_dense(tensor: torch.Tensor, num_bytes: int) -> None:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError("it holds a tensor that is sparse, quantized or without data")
    if tensor.numel() * tensor.element_size() > num_bytes:
        raise ValueError(f"it holds a tensor of shape {tuple(tensor.shape)}, larger than the file")
