"""What a run chose by measurement, kept in its folder and with copies in memory: a resumed run must round as before."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from megabatch.comm.launch import World, all_gather_objects, broadcast_from_rank0
from megabatch.errors import CheckpointError
from megabatch.files import read_json, write_text
from megabatch.runtime import Runtime
from megabatch.train.health.memory_copies import copies_folder

CHOICES_FILE = "choices.json"
FIELDS = {"precision": "auto", "channels_last": None, "fusion": "auto"}
"""Fields of `Runtime` that may be chosen by measurement, with the value that asks for that."""


def with_earlier_choices(runtime: Runtime, folder: Path, *, world: World) -> Runtime:
    """Returns `runtime` with the choices of the run in `folder` where it leaves them open; the same on all workers.

    They are in the folder on rank 0 or, if the run makes copies in memory, with those of any host. Choices that were
    made on another type of device do not count.

    Raises:
        CheckpointError: the file of choices is not one that `keep_choices` writes.
    """
    own = _read(folder) if world.is_first else {}
    if runtime.memory_copy_every_steps:
        own = own or (_read(copies_folder(folder)) if world.local_rank == 0 else {})
        earlier = next(filter(None, all_gather_objects(own, world)), {})
    else:
        earlier = broadcast_from_rank0(own, world)
    if earlier.get("device") != world.device.type:
        return runtime
    opened = {name for name, open_value in FIELDS.items() if getattr(runtime, name) == open_value}
    return dataclasses.replace(runtime, **{name: value for name, value in earlier.items() if name in opened})


def keep_choices(runtime: Runtime, folder: Path, *, precision: str, world: World) -> None:
    """Writes the choices of a run to a folder, where `runtime` leaves nothing but the precision open."""
    chosen = {name: getattr(runtime, name) for name in FIELDS}
    values = chosen | {"precision": precision, "device": world.device.type}
    write_text(folder / CHOICES_FILE, json.dumps(values) + "\n")


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CHOICES_FILE
    if not path.exists():
        return {}
    try:
        values = read_json(path)
        known = {"precision": ("fp32", "bf16", "fp16"), "channels_last": (True, False), "fusion": ("auto", "plain")}
        if all(values[name] in choices for name, choices in known.items()) and isinstance(values["device"], str):
            return dict(values)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(
        f"{path} is damaged: needed what the run chose, as JSON; delete it to choose again, after which the run may "
        "round otherwise than before"
    )
