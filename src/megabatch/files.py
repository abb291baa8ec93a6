"""File handling shared by all packages: the cache folder, atomic writes, checksums, locks between processes."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock: `locked` then excludes no other process
    fcntl = None  # type: ignore[assignment]

CAN_LOCK = fcntl is not None


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/megabatch, by default ~/.cache/megabatch: data sets, shards and tuning tables."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "megabatch"


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends, so that no reader sees half a file.

    If the block raises, the temporary file is removed and `path` stays as it was. `durable` flushes the file to disk
    before the rename, so that it survives a power failure.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield part
        if durable:
            with part.open("rb") as file:
                os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Writes a text file atomically, in UTF-8; lone surrogates of undecodable file names keep their bytes."""
    with replacing(path, durable=durable) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on the file `path`, created if missing, between processes and threads.

    The operating system releases the lock of a process that dies.
    """
    with path.open("ab") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
