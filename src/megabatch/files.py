"""File handling shared by all packages: the cache folder, new folders, atomic writes, checksums, locks, names."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megabatch.errors import SettingsError

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither: `locked` then excludes no other process
    fcntl = None  # type: ignore[assignment]
    resource = None  # type: ignore[assignment]

CAN_LOCK = fcntl is not None
MOST_JSON_BYTES = 64 << 20
"""Largest JSON file that is read."""
_MOST_OPEN_FILES = 65536  # more are never needed, and some programs iterate over all descriptors


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/megabatch, by default ~/.cache/megabatch: data sets, shards and tuning tables.

    A user without a home folder (HOME is not set and the user id has no entry in the password database, as in some
    containers) gets megabatch-UID in the folder for temporary files.

    Raises:
        SettingsError: megabatch-UID belongs to another user, who could have put anything there.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "megabatch"
    try:
        return Path.home() / ".cache" / "megabatch"
    except (RuntimeError, KeyError):
        folder = Path(tempfile.gettempdir()) / f"megabatch-{os.getuid()}"
        if os.path.lexists(folder):
            require_own(folder, "XDG_CACHE_HOME=/path/of/yours")
        return folder


def require_own(folder: Path, instead: str) -> None:
    """Raises SettingsError if `folder` belongs to another user, who could put anything there; `instead` works."""
    if folder.lstat().st_uid != os.getuid():
        raise SettingsError(f"{folder} belongs to another user; {instead} works") from None


def create_unused(path: Path) -> Path:
    """Creates the folder `path`, or the first free one of `path`-2, `path`-3, ..., and returns its path.

    Of several processes that call it with one path at the same time, each gets a folder of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
    for folder in map(path.with_name, names):
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("the numbers are infinite")


def printable(text: str) -> str:
    """`text` with control characters, line breaks and undecodable bytes of file names as backslash escapes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends, so that no reader sees half a file.

    If the block raises, the temporary file is removed and `path` stays as it was; an OSError names `path`. `durable`
    flushes the file before the rename and the folder after it, so that both survive a power failure.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield part
        if durable:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        part.replace(path)
        if durable:
            _flush_folder(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in {None, str(part)}:
            error.filename = str(path)
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _flush_folder(folder: Path) -> None:
    """Flushes the names in `folder` to disk, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders, and some file systems flush none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str, *, durable: bool = False, errors: str = "surrogateescape") -> None:
    """Writes a text file atomically, in UTF-8; by default undecodable file names in it keep their bytes."""
    with replacing(path, durable=durable) as part:
        part.write_text(text, encoding="utf-8", errors=errors)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, which may come from anyone.

    Raises:
        ValueError: it is not JSON, or nested more deeply than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """`parse_json` of a plain file of at most `MOST_JSON_BYTES`.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is a folder, pipe or device, larger, or not JSON.
    """
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("it is not a plain file")
    if facts.st_size > MOST_JSON_BYTES:
        raise ValueError(f"it has {facts.st_size:,} bytes; at most {MOST_JSON_BYTES:,} are read")
    return parse_json(path.read_bytes())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`, created if missing, between processes and threads.

    The operating system releases the lock of a process that dies. On a file system without locks no other process is
    excluded.

    Raises:
        BlockingIOError: another process or thread holds the lock, and `wait` is False.
    """
    with path.open("ab") as file:
        if fcntl is not None:
            _lock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def _lock(file: IO[bytes], operation: int) -> None:
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}:
            raise


def max_open_files() -> int:
    """Number of files that this process may have open at once (`ulimit -n`)."""
    if resource is None:
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN_FILES if soft == resource.RLIM_INFINITY else soft


def raise_open_file_limit() -> None:
    """Allows this process as many open files as the system lets it choose."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
