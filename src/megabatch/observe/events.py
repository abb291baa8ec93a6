"""Event log of a run: one JSON object per line, readable while the run writes it.

Each line has `event` (its kind), `time_s` (seconds since 1970) and the fields of that kind:

    run_start    recipe (its name), workers, versions, hardware
    step         step, epoch, loss (global mean), lr, momentum, global_batch_size, images_per_s
    evaluation   step, epoch, top1, top5, loss, num_samples, seconds
    checkpoint   step, path
    bad_samples  step, num_bad_samples (distinct), num_replaced_samples: totals over all workers; only if not 0
    warning      text
    run_end      top1, images_per_s, train_s, num_replaced_samples
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megabatch.errors import UserError
from megabatch.files import parse_json

Event = dict[str, Any]


class EventLog:
    """Appends events to `path` and flushes each line, so a killed run loses at most its last event.

    An existing file is continued (a resumed run); an incomplete last line is removed first.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_incomplete_line(path)
        # backslashreplace: the JSON escape of an undecodable byte of a file name, which `json.loads` restores
        self._path = path
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; NaN and infinities, which JSON cannot represent, become null. An OSError names the file."""
        line = {"event": event, "time_s": round(time.time(), 3)} | fields
        try:
            self._file.write(json.dumps(_as_json(line), allow_nan=False, ensure_ascii=False) + "\n")
        except OSError as error:
            error.filename = str(self._path)
            raise

    def close(self) -> None:
        """Close the file; later writes raise ValueError."""
        with contextlib.suppress(OSError):  # the end of a line that `write` could not write
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: Path) -> list[Event]:
    """Returns the events in `path`, in order, without an incomplete last line.

    Raises:
        UserError: the file cannot be read, or a line other than the last is not an event.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a run folder") from error
    events = [_parse(line) for line in lines]
    # The last element follows the last newline: empty, or an event whose writer was interrupted.
    for number, (line, event) in enumerate(zip(lines[:-1], events[:-1], strict=True), start=1):
        if event is None and line.strip():
            raise UserError(f"{path}, line {number}, is not an event; remove that line to read the others")
    return [event for event in events if event is not None]


def _parse(line: bytes) -> Event | None:
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "event" in value else None


def _drop_incomplete_line(path: Path) -> None:
    """Truncate the file after its last newline, so that the next event starts a new line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _as_json(value: Any) -> Any:
    """Returns `value` in JSON types: paths as text, arrays as lists, 0-d arrays and tensors as numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_as_json(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and torch
        return _as_json(value.tolist())
    return str(value)
