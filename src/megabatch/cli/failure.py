"""Errors as one line for a person: which exceptions have one, its length, and its way from a worker to the terminal."""

import errno
import os
import sys

from megabatch.comm.worker_errors import hand_to_parent
from megabatch.errors import INVALID_INPUT, MegabatchError, SettingsError, UserError
from megabatch.files import printable

_LONGEST = 1000
_END = 300
_ADVICE = {
    errno.EACCES: "choose a path that this user may read and write",
    errno.EPERM: "choose a path that this user may read and write",
    errno.EROFS: "choose a path on a writable file system",
    errno.ENOSPC: "free some space there, or choose a path on another disk",
    errno.EDQUOT: "free some space there, or choose a path on another disk",
    errno.EFBIG: "`ulimit -f unlimited` allows larger files",
    errno.EMFILE: "`ulimit -n 4096` allows more open files",
    errno.ENFILE: "close other programs, or raise the system's limit of open files",
    errno.ENOENT: "create it, or choose another path",
    errno.ENOTDIR: "choose a path whose parents are folders",
    errno.EISDIR: "choose the path of a file",
    errno.EEXIST: "choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "choose a path without a loop of symbolic links",
    errno.EIO: "check the disk, or choose a path on another one",
    errno.ESTALE: "mount the network file system again",
}
"""What helps against the errors of the operating system that are no faults of this program."""


def as_megabatch_error(error: BaseException) -> MegabatchError | None:
    """The error to show as one line; None for an unexpected one, whose traceback is needed."""
    if isinstance(error, MegabatchError):
        return error
    if isinstance(error, OSError) and error.errno in _ADVICE:
        where = f"{_path(error)}: " if error.filename is not None else ""
        return SettingsError(f"{where}{(error.strerror or str(error)).lower()}; {_ADVICE[error.errno]}")
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of Path.expanduser
        return SettingsError("the home folder for ~ is unknown; a path without ~ works")
    return None


def report(error: MegabatchError) -> int:
    """Prints the error as one line on stderr, through the process that started this worker; returns the exit code."""
    if not hand_to_parent(error):
        rank = os.environ.get("RANK", "0")
        is_other = rank.isdecimal() and int(rank) > 0 and "WORLD_SIZE" in os.environ
        who = f"megabatch (worker {rank})" if is_other else "megabatch"
        sys.stderr.write(f"{who}: {one_line(str(error))}\n")
    return INVALID_INPUT if isinstance(error, UserError) else 1


def one_line(text: str) -> str:
    """`text` without line breaks and control characters, and not longer than a terminal shows well."""
    return shorten(printable(" ".join(text.split())))


def shorten(text: str) -> str:
    """Cuts out the middle of a text of more than 1,000 characters; the end usually says what works."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - _END]} [...] {text[-_END:]}"


def _path(error: OSError) -> str:
    name = error.filename
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else str(name)
