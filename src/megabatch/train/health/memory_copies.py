"""Copies of the training state in the memory of each host: a job that has lost a host and its disk continues from them.

Workers hold equal states, so the first worker of each host writes its own, and nothing is sent. The copies lie in
`/dev/shm`, which outlives workers and their launcher, in the format of checkpoints.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megabatch.comm.launcher_environment import job_id
from megabatch.errors import SettingsError
from megabatch.files import require_own
from megabatch.train.checkpoint import CheckpointWriter

MEMORY = Path("/dev/shm")  # noqa: S108 - the folder in it can be read by its owner only
"""A file system in memory, on Linux."""


def copies_folder(run_folder: Path) -> Path:
    """Folder of a run's copies on this host, by its path and the job's id: the same after a restart."""
    key = hashlib.sha256(f"{run_folder.absolute()}\0{job_id()}".encode(errors="surrogateescape")).hexdigest()
    return MEMORY / f"megabatch-{key[:24]}"


def remove_outdated_copies(run_folder: Path, *, resume: bool, has_run: bool) -> None:
    """Removes the copies of an earlier run in the same folder; `has_run` if that folder holds a run.

    Where a job of one host finds no run in its folder, the run was deleted; elsewhere its disk may have been lost.
    """
    if not resume or not (job_id() or has_run):
        remove_copies(run_folder)


def remove_copies(run_folder: Path) -> None:
    """Removes the copies of a run from this host's memory, if there are any."""
    shutil.rmtree(copies_folder(run_folder), ignore_errors=True)


class MemoryCopies(CheckpointWriter):
    """Writes the newest state to this host's memory, in the background.

    A host needs memory for three states: two in `MEMORY`, of which one is being written, and one that is copied from.

    Raises:
        SettingsError: the system has no `MEMORY`, or another user made the folder.
    """

    def __init__(self, run_folder: Path, recipe: Mapping[str, Any], *, class_names: tuple[str, ...]) -> None:
        folder = copies_folder(run_folder)
        if not MEMORY.is_dir():
            raise SettingsError(f"copies in memory need {MEMORY}, which Linux has; --memory-copy-every-steps 0 works")
        folder.mkdir(mode=0o700, exist_ok=True)
        require_own(folder, "--memory-copy-every-steps 0")
        super().__init__(folder, recipe, class_names=class_names, keep=1)

    def write(self, state: Mapping[str, Any], *, step: int, epoch: float, top1: float | None) -> None:
        """Copies `state` and writes it in the background; raises SettingsError if there is too little room."""
        self.wait()
        num_bytes = sum(tensor.nbytes for tensor in _tensors(state))
        needed = num_bytes * (1 if any(self.folder.glob("step-*.pt")) else 2)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise SettingsError(
                f"copies in memory need {needed / 2**20:,.0f} MiB of {MEMORY}, {free / 2**20:,.0f} MiB are free; "
                f"`mount -o remount,size=SIZE {MEMORY}` enlarges it, and --memory-copy-every-steps 0 works without"
            )
        super().write(state, step=step, epoch=epoch, top1=top1)

    def clear(self) -> None:
        """Removes all copies: those of a state that the run gave up."""
        self.wait()
        for path in [*self.folder.glob("step-*"), *self.folder.glob(".step-*")]:
            path.unlink()


def _tensors(value: Any) -> list[torch.Tensor]:
    """Tensors of nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in _tensors(item)]
