"""Checkpoints: one file of tensors and plain numbers, and a small JSON file beside it that completes it.

    checkpoints/step-00000123.pt      the training state, torch.save, loaded with weights_only
    checkpoints/step-00000123.json    step, epoch, top1, sha256 and size of the .pt, recipe, class names; written last

Both are written atomically, the JSON last: a checkpoint without its JSON is ignored, and one whose checksum differs is
reported and skipped. Both are read as input from anyone: no code is run, no compressed entry is read. The data loader
has no state of its own: its position is a function of `samples_seen`, so a run resumes on any number of workers.
"""

import copy
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megabatch.comm.launch import World, all_gather_objects, broadcast_from
from megabatch.errors import CheckpointError
from megabatch.files import create_unused, read_json, replacing, sha256_of, write_text
from megabatch.train.plain_tensors import read_tensors

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
        count = self.recipe.get("num_classes")
        if not isinstance(count, int):
            raise CheckpointError(f"{self.path.with_suffix('.json').name} has no number of classes; another one works")
        return count

    def names(self) -> tuple[str, ...]:
        """Name of each class, in the order of the logits; "0", "1", ... without stored names."""
        return self.class_names or tuple(map(str, range(self.num_classes)))


class CheckpointWriter:
    """Writes checkpoints of one run in the background; keeps the newest `keep` and the one of best accuracy.

    `write` copies the state before it returns, so later updates cannot leak into the file. At most one write is in
    progress; its error is raised by the next `write` or by `wait`. `on_remark` receives, from the background thread,
    what a person should know: a folder that was in the way, or an old checkpoint that could not be removed.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Mapping[str, Any],
        *,
        class_names: tuple[str, ...] | None = None,
        keep: int = 2,
        on_remark: Callable[[str], None] | None = None,
    ) -> None:
        self.folder = folder
        self.recipe = dict(recipe)
        self.class_names = class_names
        self.keep = max(1, keep)
        self._remark = on_remark or (lambda _: None)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.last_write_s = (0.0, 0.0)  # start and end of the last write, on time.perf_counter

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
            raise CheckpointError(
                f"a checkpoint could not be written to {self.folder}: {error}; earlier ones are kept. When the folder "
                "can be written again, --resume continues from the newest"
            ) from error

    def _run(self, state: dict[str, Any], step: int, epoch: float, top1: float | None) -> None:
        start = time.perf_counter()
        try:
            facts: dict[str, Any] = {"recipe": self.recipe, "class_names": self.class_names}
            for suffix in (".pt", ".json"):
                _move_folder_aside(checkpoint_path(self.folder, step).with_suffix(suffix), self._remark)
            write_checkpoint(self.folder, state, **facts, step=step, epoch=epoch, top1=top1)
            remove_old(self.folder, keep=self.keep, newest=step, on_remark=self._remark)
        except Exception as error:  # noqa: BLE001 - carried to the caller by `wait`
            self._error = error
        self.last_write_s = (start, time.perf_counter())


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
    """Writes one checkpoint atomically and returns the content of its JSON.

    Raises:
        OSError: it could not be written, or the run folder has vanished, as when its file system is unmounted.
    """
    folder.mkdir(exist_ok=True)
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
    for path in folder.glob("step-*.json"):
        try:
            info = _read_info(path)
            if info.path != checkpoint_path(folder, info.step):
                raise CheckpointError(f"{path.name} describes step {info.step}")
            found.append(info)
        except CheckpointError as error:
            if on_damaged:
                on_damaged(f"{error}; skipped")
    return sorted(found, key=lambda info: info.step)


def agree_on_checkpoint(
    folders: Sequence[Path], world: World, *, back: int = 0, on_damaged: Callable[[str], None] | None = None
) -> tuple[CheckpointInfo, dict[str, Any]] | None:
    """The newest of all workers' `newest_intact` of `folders`, on every worker. A collective.

    Workers that do not find it in their own folders receive it from the first worker that does.
    """
    each = (newest_intact(folder, back=back, on_damaged=on_damaged) for folder in folders)
    found = max(filter(None, each), key=lambda one: one[0].step, default=None)
    steps = all_gather_objects(found[0].step if found else -1, world)
    newest = max(steps)
    return found if min(steps) == newest else broadcast_from(steps.index(newest), found, world)


def newest_intact(
    folder: Path, *, back: int = 0, on_damaged: Callable[[str], None] | None = None
) -> tuple[CheckpointInfo, dict[str, Any]] | None:
    """The newest checkpoint whose checksum holds, with its state, or None; damaged ones go to `on_damaged`.

    With `back` as many newer ones are passed over, but the oldest is not.
    """
    infos = list_checkpoints(folder, on_damaged=on_damaged)
    for info in reversed(infos[: max(1, len(infos) - back)]):
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
    info = find_checkpoint(path)
    if info is None:
        raise CheckpointError(f"{path} is not a checkpoint ({path.stem}.json is not there); a run folder works")
    return info, load_state(info)


def find_checkpoint(path: Path) -> CheckpointInfo | None:
    """Description of the checkpoint that `open_checkpoint` opens; None for a file without its JSON.

    Raises:
        CheckpointError: a folder without a checkpoint, or a JSON that cannot be read.
    """
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        infos = list_checkpoints(folder)
        if not infos:
            raise CheckpointError(f"no checkpoint in {path}; a run folder or a step-*.pt written by `train` works")
        return max(infos, key=lambda info: (info.top1 if info.top1 is not None else -1.0, info.step))
    description = path.with_suffix(".json")
    if path.suffix not in {".pt", ".json"} or not description.is_file():
        return None
    return _read_info(description)


def load_state(info: CheckpointInfo) -> dict[str, Any]:
    """Loads the state of `info` on the CPU; raises CheckpointError if it is missing, unreadable, damaged or hostile."""
    name = info.path.name
    if not info.path.is_file():
        raise CheckpointError(f"checkpoint {name} is {'not a file' if info.path.exists() else 'missing'}")
    try:
        is_whole = info.path.stat().st_size == info.num_bytes and sha256_of(info.path) == info.sha256
    except OSError as error:
        raise CheckpointError(f"checkpoint {name} cannot be read: {error.strerror}") from error
    if not is_whole:
        raise CheckpointError(f"checkpoint {name} is damaged: its checksum differs from the one written")
    return read_tensors(info.path)


def remove_old(
    folder: Path, *, keep: int, newest: int | None = None, on_remark: Callable[[str], None] | None = None
) -> None:
    """Deletes all but the newest `keep` checkpoints and the one of best top-1 (the newest of equals).

    Those of later steps than `newest`, which has just been written, were damaged or given up when the run went back:
    they are deleted too, in place of older ones.
    """
    infos = list_checkpoints(folder)
    current = [info for info in infos if newest is None or info.step <= newest]
    kept = {info.step for info in current[-keep:]}
    measured = [info for info in current if info.top1 is not None]
    if measured:
        kept.add(max(measured, key=lambda info: (info.top1, info.step)).step)
    leftovers = folder.glob(".step-*.part")  # of a process that was killed while writing
    old = [info.path for info in infos if info.step not in kept]
    # The JSON first: without it a checkpoint is ignored.
    for path in [*(path.with_suffix(suffix) for path in old for suffix in (".json", ".pt")), *leftovers]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            if on_remark:
                on_remark(f"{path} could not be removed ({error.strerror}); remove it to free its space")


def _move_folder_aside(path: Path, on_remark: Callable[[str], None]) -> None:
    """Renames a folder that has the name of the checkpoint to be written."""
    if path.is_dir() and not path.is_symlink():
        aside = path.replace(create_unused(path.with_name(f"{path.name}.folder")))
        on_remark(f"{path} was a folder where a checkpoint is written; it is now {aside.name}")


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
    """Raises CheckpointError if `path` cannot be read or does not describe a checkpoint."""
    try:
        facts = read_json(path)
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}, this version reads {FORMAT}")
        names, top1 = facts.get("class_names"), facts["top1"]
        info = CheckpointInfo(
            path.with_suffix(".pt"),
            int(facts["step"]),
            float(facts["epoch"]),
            None if top1 is None else float(top1),
            str(facts["sha256"]),
            int(facts["num_bytes"]),
            dict(facts["recipe"]),
            None if names is None else tuple(map(str, names)),
        )
        if info.step < 0 or not math.isfinite(info.epoch) or not math.isfinite(info.top1 or 0.0):
            raise ValueError("step, epoch or top1 is not a number of a run")
    except KeyError as error:
        raise CheckpointError(f"{path.name} cannot be read: it has no {error}") from error
    except (OSError, ValueError, TypeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path.name} cannot be read: {reason}") from error
    return info
