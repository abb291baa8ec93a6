"""Event log of a run: one JSON object per line, readable while the run writes it.

Each line has `event` (its kind), `time_s` (seconds since 1970) and the fields of that kind; docs/events.md lists them.
Readers ignore kinds and fields that they do not know, so that adding one does not change `SCHEMA`.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from megabatch.errors import UserError
from megabatch.files import parse_json

Event = dict[str, Any]
SCHEMA = 1
"""Version of the events, in `run_start`; it grows when a field changes its meaning or is removed."""


class EventWriter(Protocol):
    """Receives the events of a run: the JSON lines of `EventLog`, or a tracker (observe/trackers.py)."""

    def write(self, event: str, **fields: Any) -> None:
        """Takes one event."""
        ...

    def close(self) -> None:
        """Ends the writing."""
        ...


NUMBERS = frozenset(
    {"step", "epoch", "loss", "lr", "momentum", "global_batch_size", "images_per_s", "top1", "top5", "num_samples"}
    | {"resolution", "exposed_ms", "train_s"}
)
"""Fields that are numbers in every event that has them; a line in which one is not counts as damaged."""


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
        UserError: the file cannot be read, a line other than the last is not an event, or a newer version wrote them.
    """
    follower = EventFollower(path)
    events = list(follower.new_events())
    rest = _parse(follower.incomplete)
    return [*events, rest] if rest is not None else events


class EventFollower:
    """Reads events of a file that grows; each call of `new_events` continues where the last one ended.

    Attributes:
        incomplete: the bytes after the last newline: empty, or an event whose writer is not done or was interrupted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._line_number = 0
        self.incomplete = b""

    def new_events(self) -> Iterator[Event]:
        """Yields complete events that were not read before.

        Raises:
            UserError: as `read_events`.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                *lines, self.incomplete = file.read().split(b"\n")
        except OSError as error:
            raise UserError(f"{self._path} cannot be read ({error.strerror}); give a run folder") from error
        for line in lines:
            self._offset += len(line) + 1
            self._line_number += 1
            event = _parse(line)
            if event is None and line.strip():
                text = f"{self._path}, line {self._line_number}, is not an event; remove that line to read the others"
                raise UserError(text)
            if event is not None:
                _require_known_schema(self._path, event)
                yield event


def _require_known_schema(path: Path, event: Event) -> None:
    schema = event.get("schema", SCHEMA) if event["event"] == "run_start" else SCHEMA
    if not isinstance(schema, int) or schema > SCHEMA:
        raise UserError(
            f"{path} has events of schema {schema}, this megabatch reads up to {SCHEMA}; the version of megabatch that "
            "wrote the run reads it"
        )


def _parse(line: bytes) -> Event | None:
    try:
        value = parse_json(line)
    except ValueError:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        return None
    return value if all(_is_number(value[field]) for field in NUMBERS & value.keys()) else None


def _is_number(value: object) -> bool:
    """True for null, which stands for NaN, and a number that a float can represent."""
    return value is None or (type(value) in {int, float} and abs(value) <= sys.float_info.max)  # type: ignore[arg-type]


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
