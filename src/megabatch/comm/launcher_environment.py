"""Reads and checks the environment variables with which a launcher, such as torchrun, describes a worker.

Only this package and the command line read the environment.
"""

import os
import socket
from dataclasses import dataclass

from megabatch.comm.worker_watch import RUN_ID
from megabatch.errors import SettingsError
from megabatch.files import max_open_files

LEAST_OPEN_FILES = 128
_ALONE = "unset RANK and WORLD_SIZE to run without a launcher"


@dataclass(frozen=True)
class Launched:
    """A launcher's description of this worker."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def started_by_launcher(workers: int | None = None) -> bool:
    """True if torchrun or `run_local_workers` started this process as a worker.

    Raises:
        SettingsError: RANK is set without WORLD_SIZE, or the reverse; or the user wants another number of local
            `workers` than a launcher started.
    """
    has_rank, has_size = bool(os.environ.get("RANK")), bool(os.environ.get("WORLD_SIZE"))
    if has_rank != has_size:
        given, missing = ("RANK", "WORLD_SIZE") if has_rank else ("WORLD_SIZE", "RANK")
        raise SettingsError(
            f"{given}={os.environ[given]} is set without {missing}; torchrun sets both; unset {given} to run without"
        )
    if has_rank and workers and not _started_by_train():  # which may have restarted fewer
        started = os.environ.get("LOCAL_WORLD_SIZE") or "1"
        if str(workers) != started:
            raise SettingsError(
                f"--workers {workers} was given, but a launcher (RANK is set) started {started} on this host; "
                "without --workers the command works"
            )
    return has_rank


def _started_by_train() -> bool:
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(RUN_ID)


def job_id() -> str:
    """Id that torchrun's --rdzv-id gave the job, the same on all hosts and after restarts; "" without torchrun."""
    return "" if _started_by_train() else os.environ.get("TORCHELASTIC_RUN_ID", "")


def read_launcher() -> Launched:
    """Returns the launcher's description of this worker.

    Raises:
        SettingsError: a variable is missing, is no number or contradicts another.
    """
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise SettingsError(f"RANK and WORLD_SIZE are set without {name}; torchrun sets all of them; {_ALONE}")
    _number("MASTER_PORT", "", least=1, most=65535)
    world_size = _number("WORLD_SIZE", "", least=1)
    return Launched(
        rank=_number("RANK", "", least=0, most=world_size - 1),
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", "0", least=0, most=world_size - 1),
        local_world_size=_number("LOCAL_WORLD_SIZE", "1", least=1, most=world_size),
    )


def _number(name: str, default: str, *, least: int, most: int | None = None) -> int:
    text = os.environ.get(name) or default
    if text.isdecimal() and least <= int(text) and (most is None or int(text) <= most):
        return int(text)
    limit = f"of at least {least}" if most is None else f"from {least} to {most}"
    needed = f"a whole number {limit}" if least != most else str(least)
    raise SettingsError(f"{name}={text} was given, needed {needed}, as torchrun sets; {_ALONE}")


def check_open_files() -> None:
    """Raises SettingsError if this process may open too few files: a worker that finds none left may hang."""
    if (allowed := max_open_files()) < LEAST_OPEN_FILES:
        raise SettingsError(
            f"{allowed} open files are allowed, and workers that exchange gradients need {LEAST_OPEN_FILES}; "
            "`ulimit -n 4096` allows more, and --workers 1 needs fewer"
        )


def check_interface(backend: str) -> None:
    """Raises SettingsError if the network interface that the environment names for `backend` is not on this machine.

    GLOO_SOCKET_IFNAME lists names. NCCL_SOCKET_IFNAME lists prefixes, or names after "=", or after "^" what to avoid.
    """
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    wanted = os.environ.get(variable, "")
    if not wanted or wanted.startswith("^"):
        return
    present = [name for _, name in socket.if_nameindex()]
    names = wanted.removeprefix("=").split(",")
    if backend == "nccl" and not wanted.startswith("="):
        found = any(interface.startswith(tuple(names)) for interface in present)
    else:
        found = all(name in present for name in names) if backend == "gloo" else any(name in present for name in names)
    if not found:
        raise SettingsError(
            f"{variable}={wanted} is no network interface of {socket.gethostname()}, which has {', '.join(present)}; "
            f"unset {variable} to use the default"
        )
