"""Memory of the host: how much there is, and how to stop giving it back to the system at every step.

A training step on a CPU allocates and frees gigabytes. glibc returns every large block to the system when it is freed,
and the system hands the next one out page by page, zeroed: a fifth of ResNet-50's step is then spent in page faults.
"""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2 << 20
_GROWTH = 64 << 20
_MOST_RESERVED = 32 << 30
_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def keep_freed_memory(num_workers: int = 1) -> str | None:
    """Lets this process keep what it frees, in huge pages where the system grants them; what was done, in words.

    For this process and until its end: freed blocks go back to the allocator's own pool, large ones too, and address
    space for half of the memory that is there (shared among `num_workers` processes) is marked for huge pages of
    2 MiB. Nothing is taken before it is used; what was once used stays with the process. Call it before the first
    large tensor. None where the C library is not glibc: nothing was done then.
    """
    library = _glibc()
    if library is None:
        return None
    library.mallopt(_M_MMAP_MAX, 0)  # or large blocks come from mmap, and go back to it
    library.mallopt(_M_TRIM_THRESHOLD, -1)  # never
    library.mallopt(_M_TOP_PAD, _GROWTH)
    available = available_bytes()
    room = min(_MOST_RESERVED, (available or 0) // 2 // max(1, num_workers))
    if not _mark_for_huge_pages(library, room):
        return "freed memory is kept"
    return "freed memory is kept, in huge pages"


def available_bytes() -> int | None:
    """Bytes that this process and its like may still use: the machine's, or less under a control group's limit.

    None where the system does not tell.
    """
    known = [limit for limit in (_of_machine(), *_of_control_groups()) if limit is not None]
    return min(known, default=None)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None


def _mark_for_huge_pages(library: ctypes.CDLL, num_bytes: int) -> bool:
    """Takes a block from the heap's end, marks its pages, and frees it: the heap keeps it, with the mark."""
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    strict = _text(_PROC / "sys/vm/overcommit_memory").strip() == "2"  # address space counts as memory there
    block = library.malloc(num_bytes) if num_bytes > 2 * _HUGE_PAGE and not strict else None
    if not block:
        return False  # no memory to speak of, or the user's limit on address space is lower
    first = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    length = (block + num_bytes - first) // _HUGE_PAGE * _HUGE_PAGE
    marked = library.madvise(first, length, _MADV_HUGEPAGE) == 0
    library.free(block)
    return marked and "[never]" not in _text(Path("/sys/kernel/mm/transparent_hugepage/enabled"))


def _of_machine() -> int | None:
    for line in _text(_PROC / "meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _of_control_groups() -> Iterator[int]:
    """What each limit above this process leaves, in version 2 and in version 1 of the interface."""
    for line in _text(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _left_in(_CGROUPS, path, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            yield from _left_in(_CGROUPS / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _left_in(root: Path, path: str, limit_name: str, used_name: str) -> Iterator[int]:
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        limit, used = _text(group / limit_name).strip(), _text(group / used_name).strip()
        if limit.isdecimal() and used.isdecimal():
            yield max(0, int(limit) - int(used))
        if group == root:
            return


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
