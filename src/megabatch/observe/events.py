"""A run's log: one JSON object per line, readable at any moment, also while the run writes it.

Each line holds `event` (its kind), `time_s` (seconds since 1970) and the fields of that kind:

    run_start    what runs where: recipe name, workers, versions, hardware
    step         step, epoch, loss (global mean), lr, momentum, global_batch_size, images_per_s
    evaluation   step, epoch, top1, top5, loss, num_samples, seconds
    checkpoint   step, path
    bad_samples  step, num_bad_samples (different ones), num_replaced_samples: so far, over all workers; only if any
    warning      text
    run_end      top1, images_per_s, train_s, num_replaced_samples
"""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megabatch.errors import UserError

Event = dict[str, Any]


class EventLog:
    """Appends events to `path`, each flushed as one whole line, so that a killed run loses at most its last line.

    A file that is there already is continued (a resumed run), less a line that was torn when its writer died.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; numbers that JSON cannot hold (NaN, infinities) become null."""
        line = {"event": event, "time_s": round(time.time(), 3)} | fields
        self._file.write(json.dumps(_as_json(line), allow_nan=False, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Close the file; further events raise ValueError."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: Path) -> list[Event]:
    """Every event in `path`, in the order of writing, less a last line that is torn.

    Raises:
        UserError: there is no such file, or a line other than the last is no JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the folder of a run") from error
    events = [_parse(line) for line in lines]
    for number, (line, event) in enumerate(zip(lines[:-1], events[:-1], strict=True), start=1):
        if event is None and line.strip():
            raise UserError(f"{path}, line {number}, is no event; remove that line to read the others")
    return [event for event in events if event is not None]


def _parse(line: bytes) -> Event | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "event" in value else None


def _drop_torn_line(path: Path) -> None:
    """Cut what follows the last newline: the next event must start on a line of its own."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _as_json(value: Any) -> Any:
    """`value` in types that JSON knows: paths as text, arrays and tensors of one element as numbers."""
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
