"""Checks of an installation: what training uses on this machine, and what to change."""

import os
import resource
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megabatch.cores import requested_threads, usable_cores

GIB = 2**30
LEAST_OPEN_FILES = 4096
LEAST_SHARED_BYTES = GIB
STEADY_CLOCKS = {"tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page"}


@dataclass(frozen=True)
class Finding:
    """A checked part: its state in words and, if it should be changed, how."""

    part: str
    state: str
    advice: str = ""


def check_installation(root: Path = Path("/")) -> Iterator[Finding]:
    """Yields the findings, one part after another. Files of the system are read below `root`."""
    yield _torch(root)
    yield _nccl()
    yield from _compiled()
    yield from _limits(root)
    yield from _machine(root)


def _torch(root: Path) -> Finding:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    state = f"{torch.__version__}, built with {built}"
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Finding("torch", f"{state}; {names}")
    if not (root / "proc/driver/nvidia/version").is_file():
        return Finding("torch", f"{state}; no NVIDIA driver, training uses the CPU")
    if torch.version.cuda is None:
        return Finding("torch", f"{state}; an NVIDIA driver is loaded", "install a torch built with CUDA (pytorch.org)")
    return Finding("torch", f"{state}; its CUDA finds no GPU", "compare the driver's CUDA in `nvidia-smi` with torch's")


def _nccl() -> Finding:
    import torch
    import torch.distributed as dist

    if not dist.is_nccl_available():
        return Finding("exchange", "gloo; this torch has no NCCL, which several GPUs need")
    return Finding("exchange", f"gloo, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")  # type: ignore[no-untyped-call]


def _compiled() -> Iterator[Finding]:
    import torch

    from megabatch.data.jpeg import library as decoder
    from megabatch.kernels.cpu import library as kernels

    has_kernels = kernels.function("megabatch_norm_forward") is not None
    yield _library("JPEG decoder", decoder.is_available(), "python -m megabatch.data.jpeg.library")
    yield _library("CPU kernels", has_kernels, "python -m megabatch.kernels.cpu.library")
    yield Finding("instruction set", torch.backends.cpu.get_cpu_capability())


def _library(part: str, found: bool, command: str) -> Finding:
    if found:
        return Finding(part, "compiled")
    return Finding(part, "not compiled; slower replacements are used", f"`{command}` compiles it, with a C compiler")


def _limits(root: Path) -> Iterator[Finding]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    too_few = hard != resource.RLIM_INFINITY and hard < LEAST_OPEN_FILES
    number = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,} at most"
    yield Finding("open files", number, f"`ulimit -Hn {LEAST_OPEN_FILES}` or more" if too_few else "")
    shared = root / "dev/shm"
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        advice = "a container needs `--shm-size 1g` or more for NCCL" if free < LEAST_SHARED_BYTES else ""
        yield Finding("shared memory", f"{free / GIB:.1f} GiB free", advice)


def _machine(root: Path) -> Iterator[Finding]:
    cores, wanted = usable_cores(), requested_threads()
    asked = f", OMP_NUM_THREADS={wanted}" if wanted else ""
    advice = "unset OMP_NUM_THREADS, or use --threads" if wanted and wanted > cores else ""
    yield Finding("cores", f"{cores} usable of {os.cpu_count()}{asked}", advice)
    nodes = len(list((root / "sys/devices/system/node").glob("node[0-9]*")))
    several = f"{nodes} NUMA nodes", "on CPUs use one worker per node: `--workers` of at least their number"
    yield Finding("memory nodes", *several) if nodes > 1 else Finding("memory nodes", "1")
    up = _interfaces(root)
    choose = "gloo takes the host name's; GLOO_SOCKET_IFNAME=NAME (NCCL_SOCKET_IFNAME) selects another"
    yield Finding("interfaces", ", ".join(up) or "loopback only", choose if len(up) > 1 else "")
    clock = _read(root / "sys/devices/system/clocksource/clocksource0/current_clocksource")
    if clock:
        slow = clock not in STEADY_CLOCKS
        yield Finding("clock", clock, "reading it is slow; the kernel's option clocksource=tsc" if slow else "")


def _interfaces(root: Path) -> list[str]:
    """Names of the network interfaces that are up, without loopback."""
    names = (name for _, name in socket.if_nameindex() if name != "lo")
    return [name for name in names if _read(root / "sys/class/net" / name / "operstate") == "up"]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
