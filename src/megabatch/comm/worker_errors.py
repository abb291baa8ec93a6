"""Hands the errors of local workers to the process that started them, which prints one line for all. No torch."""

import os
from collections.abc import Iterable
from pathlib import Path

from megabatch import errors
from megabatch.errors import MegabatchError, PeerError, UserError
from megabatch.files import write_text

FOLDER_VARIABLE = "MEGABATCH_ERROR_FOLDER"
"""Environment variable of local workers: the folder in which they leave their errors, a file per rank."""


def hand_to_parent(error: MegabatchError) -> bool:
    """Leaves `error` to the process that started this worker; False if that process does not wait for it."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return False
    try:
        write_text(
            Path(folder) / os.environ.get("RANK", "0"), f"{type(error).__name__}: {error}", errors="surrogatepass"
        )
    except OSError:
        return False
    return True


def end_process(error: MegabatchError) -> None:
    """Ends this process from any thread, with `error` handed to its parent or on stderr, and exit code 1.

    Buffers of files are not flushed; for a main thread that waits in C++ for a worker that is gone.
    """
    if not hand_to_parent(error):
        os.write(2, f"megabatch (worker {os.environ.get('RANK', '0')}): {error}\n".encode(errors="replace"))
    os._exit(1)


def read_errors(folder: Path) -> list[MegabatchError]:
    """Errors that workers left in `folder`, in the order in which they were raised."""
    paths = [path for path in folder.iterdir() if path.name.isdecimal()]
    return [
        _parse(path.read_text(encoding="utf-8", errors="surrogatepass"))
        for path in sorted(paths, key=lambda path: path.stat().st_mtime)
    ]


def find_cause(found: Iterable[MegabatchError]) -> MegabatchError | None:
    """The error that ended the run: invalid input, else the first that is not about another worker, else the first."""
    return min(found, key=lambda error: (not isinstance(error, UserError), isinstance(error, PeerError)), default=None)


def _parse(text: str) -> MegabatchError:
    kind, _, message = text.partition(": ")
    found = getattr(errors, kind, MegabatchError)
    return found(message) if issubclass(found, MegabatchError) else MegabatchError(text)
