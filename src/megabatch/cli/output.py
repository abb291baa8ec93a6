"""Standard output and standard error that can print any text, and whose reader may leave."""

import errno
import io
import os
import sys
from typing import Any, TextIO

from rich.console import Console

NON_TERMINAL_WIDTH = 118
_READER_IS_GONE = {errno.EPIPE, errno.EIO, errno.ENXIO}
"""Errors of writing to a pipe without a reader, and to a terminal that was closed."""


class _Descriptor(io.FileIO):
    """A descriptor that becomes the null device when its reader is gone: a run goes on without its terminal."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _READER_IS_GONE:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return super().write(data)


def open_output() -> None:
    """Replaces `sys.stdout` and `sys.stderr`; characters that their encoding lacks are printed as escapes."""
    sys.stdout, sys.stderr = _reopened(sys.stdout), _reopened(sys.stderr)


def make_console() -> Console:
    """Console for tables: as wide as the terminal, or `NON_TERMINAL_WIDTH` columns for a file or pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=NON_TERMINAL_WIDTH)


def _reopened(stream: TextIO | None) -> TextIO:
    """The stream on the same descriptor; the null device for a closed one; one that is not a file, unchanged."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")  # for as long as the process lives
    if type(stream) is not io.TextIOWrapper:
        return stream
    raw = getattr(stream.buffer, "raw", stream.buffer)  # `python -u` has no buffer
    if type(raw) is not io.FileIO:
        return stream
    stream.flush()
    descriptor = _Descriptor(raw.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        descriptor if raw is stream.buffer else io.BufferedWriter(descriptor),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
