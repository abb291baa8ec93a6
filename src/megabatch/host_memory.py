"""Host memory: the available amount, and a setting that keeps freed memory in the process.

A training step on a CPU allocates and frees gigabytes. glibc returns every large block to the system when it is freed,
and the next allocation faults its pages in one by one, zeroed: page faults take a fifth of ResNet-50's step.
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
    """Keeps freed memory in this process, in huge pages if the system grants them; returns a description or None.

    In effect until the process ends: freed blocks, large ones too, return to the allocator's pool, and address space
    for half of the available memory (divided by `num_workers`) is marked for huge pages of 2 MiB. Memory is committed
    only when it is first used, and then stays with the process. Call it before the first large tensor. Returns None,
    with nothing changed, if the C library is not glibc.
    """
    library = _glibc()
    if library is None:
        return None
    library.mallopt(_M_MMAP_MAX, 0)  # large blocks would come from mmap and be unmapped when freed
    library.mallopt(_M_TRIM_THRESHOLD, -1)  # never trim the heap
    library.mallopt(_M_TOP_PAD, _GROWTH)
    available = available_bytes()
    room = min(_MOST_RESERVED, (available or 0) // 2 // max(1, num_workers))
    if not _mark_for_huge_pages(library, room):
        return "freed memory is kept"
    return "freed memory is kept, in huge pages"


def available_bytes() -> int | None:
    """Bytes that can still be allocated on this machine, or under a control group's limit; None if unknown."""
    known = [limit for limit in (_of_machine(), *_of_control_groups()) if limit is not None]
    return min(known, default=None)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None


def _mark_for_huge_pages(library: ctypes.CDLL, num_bytes: int) -> bool:
    """Allocates a block at the end of the heap, marks its pages and frees it; the heap keeps it, with the mark."""
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    strict = _text(_PROC / "sys/vm/overcommit_memory").strip() == "2"  # there reserved address space counts as memory
    block = library.malloc(num_bytes) if num_bytes > 2 * _HUGE_PAGE and not strict else None
    if not block:
        return False  # too little memory, or a lower limit on address space
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
    """Bytes left under each control-group limit that applies to this process, in versions 2 and 1 of cgroups."""
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
