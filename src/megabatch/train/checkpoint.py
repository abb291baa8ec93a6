"""Checkpoints: one file of tensors and plain numbers, and a small JSON file beside it that completes it.

    checkpoints/step-00000123.pt      the training state, torch.save, loaded with weights_only
    checkpoints/step-00000123.json    step, epoch, top1, sha256 and size of the .pt, recipe, class names; written last

Both are written atomically, the JSON last: a checkpoint without its JSON is ignored, and one whose checksum differs is
reported and skipped. The data loader has no state of its own: its position is a function of `samples_seen`, so a run
resumes on any number of workers.
"""

import copy
import json
import pickle  # only its error class: torch.load raises it for what is not plain tensors
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megabatch.errors import CheckpointError
from megabatch.files import replacing, sha256_of, write_text

FORMAT = 1


@dataclass(frozen=True)
class CheckpointInfo:
    """The JSON beside a checkpoint; `class_names` is None if the version that wrote it stored none."""

    path: Path
    step: int
    epoch: float
    top1: float | None
    sha256: str
    num_bytes: int
    recipe: dict[str, Any]
    class_names: tuple[str, ...] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes that the model tells apart."""
        return int(self.recipe["num_classes"])


class CheckpointWriter:
    """Writes checkpoints of one run in the background; keeps the newest `keep` and the one of best accuracy.

    `write` copies the state before it returns, so later updates cannot leak into the file. At most one write is in
    progress; its error is raised by the next `write` or by `wait`.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Mapping[str, Any],
        *,
        class_names: tuple[str, ...] | None = None,
        keep: int = 2,
    ) -> None:
        self.folder = folder
        self.recipe = dict(recipe)
        self.class_names = class_names
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
        """Waits until the write in progress, if any, is on disk; raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise CheckpointError(f"a checkpoint could not be written to {self.folder}: {error}") from error

    def _run(self, state: dict[str, Any], step: int, epoch: float, top1: float | None) -> None:
        try:
            facts: dict[str, Any] = {"recipe": self.recipe, "class_names": self.class_names}
            write_checkpoint(self.folder, state, **facts, step=step, epoch=epoch, top1=top1)
            remove_old(self.folder, keep=self.keep)
        except Exception as error:  # noqa: BLE001 - carried to the caller by `wait`
            self._error = error


def write_checkpoint(
    folder: Path,
    state: Mapping[str, Any],
    *,
    recipe: Mapping[str, Any],
    class_names: tuple[str, ...] | None = None,
    step: int,
    epoch: float,
    top1: float | None,
) -> CheckpointInfo:
    """Writes one checkpoint atomically and returns the content of its JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder, step)
    with replacing(path, durable=True) as part:
        _save(dict(state), part)
        info = CheckpointInfo(path, step, epoch, top1, sha256_of(part), part.stat().st_size, dict(recipe), class_names)
    facts: dict[str, Any] = {"format": FORMAT, "step": step, "epoch": epoch, "top1": top1, "sha256": info.sha256}
    facts |= {"num_bytes": info.num_bytes, "recipe": info.recipe, "class_names": class_names}
    write_text(path.with_suffix(".json"), json.dumps(facts, indent=1), durable=True)
    return info


def _save(state: dict[str, Any], path: Path) -> None:
    """Writes `state`; raises the system's OSError, such as for a full disk, in place of torch's, which hides it."""
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of the checkpoint of `step` in a checkpoints folder."""
    return folder / f"step-{step:08d}.pt"


def list_checkpoints(folder: Path, *, on_damaged: Callable[[str], None] | None = None) -> list[CheckpointInfo]:
    """Checkpoints with a readable JSON, oldest first; the contents are not verified here."""
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
    """The newest checkpoint whose checksum holds, with its state, or None; damaged ones go to `on_damaged`."""
    for info in reversed(list_checkpoints(folder, on_damaged=on_damaged)):
        try:
            return info, load_state(info)
        except CheckpointError as error:
            if on_damaged:
                on_damaged(f"{error}; skipped")
    return None


def open_checkpoint(path: Path) -> tuple[CheckpointInfo, dict[str, Any]]:
    """Opens a checkpoint: a `.pt` or its `.json`, or the best of a run folder (the newest if none was evaluated).

    Raises:
        CheckpointError: it is missing or damaged.
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
    """Loads the state of `info` on the CPU; raises CheckpointError if the file is missing or its bytes differ."""
    if not info.path.is_file():
        raise CheckpointError(f"checkpoint {info.path.name} is missing")
    if info.path.stat().st_size != info.num_bytes or sha256_of(info.path) != info.sha256:
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
            info.path.with_suffix(".json").unlink(missing_ok=True)  # first: without its JSON a checkpoint is ignored
            info.path.unlink(missing_ok=True)
    for leftover in folder.glob(".step-*.part"):  # of a process that was killed while writing
        leftover.unlink(missing_ok=True)


def copy_to_cpu(value: Any) -> Any:
    """Deep copy of nested dicts and lists, with every tensor copied to CPU memory."""
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
    names = facts.get("class_names")
    return CheckpointInfo(
        path.with_suffix(".pt"),
        int(facts["step"]),
        float(facts["epoch"]),
        facts["top1"],
        str(facts["sha256"]),
        int(facts["num_bytes"]),
        dict(facts["recipe"]),
        None if names is None else tuple(map(str, names)),
    )
