"""Checkpoints: one file of tensors and plain numbers, one small JSON beside it that makes it count.

    checkpoints/step-00000123.pt      the training state, torch.save, loaded with weights_only
    checkpoints/step-00000123.json    step, epoch, top1, sha256 and size of the .pt, the recipe; written last

Both are written under another name and renamed, the JSON last: a checkpoint without its JSON does not exist, and one
whose checksum differs is named and skipped. Nothing of the data loader is kept: its position is a function of
`samples_seen`, so a run goes on with any number of workers.
"""

import copy
import hashlib
import json
import os
import pickle  # only its error class: torch.load raises it for what is not plain tensors
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megabatch.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True)
class CheckpointInfo:
    """The JSON beside a checkpoint."""

    path: Path
    step: int
    epoch: float
    top1: float | None
    sha256: str
    num_bytes: int
    recipe: dict[str, Any]


class CheckpointWriter:
    """Writes checkpoints of one run in the background, keeps the newest `keep` and the one of best accuracy.

    `write` copies the state before it returns, so later updates cannot leak into the file; at most one write is under
    way, and an error of it is raised by the next `write` or by `wait`.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Any], *, keep: int = 2) -> None:
        self.folder = folder
        self.recipe = dict(recipe)
        self.keep = max(1, keep)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, state: Mapping[str, Any], *, step: int, epoch: float, top1: float | None) -> None:
        """Copies `state` and writes it in the background."""
        self.wait()
        snapshot = copy_to_cpu(state)
        self._thread = threading.Thread(target=self._run, args=(snapshot, step, epoch, top1), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns when the write under way, if any, is on disk; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(f"a checkpoint could not be written to {self.folder}: {error}") from error

    def _run(self, state: dict[str, Any], step: int, epoch: float, top1: float | None) -> None:
        try:
            write_checkpoint(self.folder, state, recipe=self.recipe, step=step, epoch=epoch, top1=top1)
            remove_old(self.folder, keep=self.keep)
        except Exception as error:  # noqa: BLE001 - carried to the caller by `wait`
            self._error = error


def write_checkpoint(
    folder: Path, state: Mapping[str, Any], *, recipe: Mapping[str, Any], step: int, epoch: float, top1: float | None
) -> CheckpointInfo:
    """Writes one checkpoint, atomically, and returns what its JSON says."""
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, step)
    part = path.with_suffix(".pt.part")
    torch.save(dict(state), part)
    info = CheckpointInfo(path, step, epoch, top1, _sha256(part), part.stat().st_size, dict(recipe))
    _sync(part)
    os.replace(part, path)
    facts: dict[str, Any] = {"format": FORMAT, "step": step, "epoch": epoch, "top1": top1, "sha256": info.sha256}
    facts |= {"num_bytes": info.num_bytes, "recipe": info.recipe}
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(facts, indent=1))
    _sync(part)
    os.replace(part, path.with_suffix(".json"))
    return info


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is in a checkpoints folder."""
    return folder / f"step-{step:08d}.pt"


def list_checkpoints(folder: Path, *, on_damaged: Callable[[str], None] | None = None) -> list[CheckpointInfo]:
    """Checkpoints whose JSON can be read, oldest first; the contents are not verified here."""
    found = []
    for path in sorted(folder.glob("step-*.json")):
        try:
            found.append(_read_info(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            if on_damaged:
                on_damaged(f"{path.name} cannot be read ({error}); skipped")
    return sorted(found, key=lambda info: info.step)


def newest_intact(
    folder: Path, *, on_damaged: Callable[[str], None] | None = None
) -> tuple[CheckpointInfo, dict[str, Any]] | None:
    """The newest checkpoint whose checksum holds, with its state; None if there is none. Damaged ones are named."""
    for info in reversed(list_checkpoints(folder, on_damaged=on_damaged)):
        try:
            return info, load_state(info)
        except CheckpointError as error:
            if on_damaged:
                on_damaged(f"{error}; skipped")
    return None


def open_checkpoint(path: Path) -> tuple[CheckpointInfo, dict[str, Any]]:
    """The checkpoint at `path`: a `.pt` or its `.json`, or of a run folder the best (without accuracies the newest).

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        infos = list_checkpoints(folder)
        if not infos:
            raise CheckpointError(f"no checkpoint in {path}; a run folder or a step-*.pt written by `train` works")
        best = max(infos, key=lambda info: (info.top1 if info.top1 is not None else -1.0, info.step))
        return best, load_state(best)
    description = path.with_suffix(".json")
    if not description.is_file():
        raise CheckpointError(f"{path} is not a checkpoint ({description.name} is not there); a run folder works")
    try:
        info = _read_info(description)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{description} cannot be read: {error}") from error
    return info, load_state(info)


def load_state(info: CheckpointInfo) -> dict[str, Any]:
    """The state behind `info`, on the CPU; CheckpointError if the file is missing or its bytes differ."""
    if not info.path.is_file():
        raise CheckpointError(f"checkpoint {info.path.name} is missing")
    if info.path.stat().st_size != info.num_bytes or _sha256(info.path) != info.sha256:
        raise CheckpointError(f"checkpoint {info.path.name} is damaged: its checksum differs from the one written")
    try:
        state: dict[str, Any] = torch.load(info.path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"checkpoint {info.path.name} could not be read as plain tensors: {error}") from error
    return state


def remove_old(folder: Path, *, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints and the one of best top-1 (the newest of equals)."""
    infos = list_checkpoints(folder)
    kept = {info.step for info in infos[-keep:]}
    measured = [info for info in infos if info.top1 is not None]
    if measured:
        kept.add(max(measured, key=lambda info: (info.top1, info.step)).step)
    for info in infos:
        if info.step not in kept:
            info.path.with_suffix(".json").unlink(missing_ok=True)  # first: what has no JSON does not count
            info.path.unlink(missing_ok=True)


def copy_to_cpu(value: Any) -> Any:
    """A deep copy of nested dicts and lists with every tensor copied to CPU memory of its own."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: copy_to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to_cpu(item) for item in value)
    return copy.copy(value)


def _read_info(path: Path) -> CheckpointInfo:
    facts = json.loads(path.read_text())
    if facts["format"] != FORMAT:
        raise ValueError(f"format {facts['format']}, this version reads {FORMAT}")
    return CheckpointInfo(
        path.with_suffix(".pt"),
        int(facts["step"]),
        float(facts["epoch"]),
        facts["top1"],
        str(facts["sha256"]),
        int(facts["num_bytes"]),
        dict(facts["recipe"]),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
