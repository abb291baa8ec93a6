"""Weights that a run starts from: reads `--init-from` and fits its tensors to a model."""

import pickle  # only its error class: torch.load raises it for what is not plain tensors
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megabatch.errors import CheckpointError
from megabatch.files import sha256_of
from megabatch.nn.levels import in_head, levels
from megabatch.train.checkpoint import find_checkpoint, load_state

_CONTAINERS = ("state_dict", "model", "module")  # keys under which other training scripts store the weights
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile and Lightning
_SHOWN = 4


@dataclass(frozen=True)
class Matched:
    """Tensors of a file that fit a model, by name; `str` describes what was loaded and what was not."""

    tensors: dict[str, Tensor]
    new: list[str]  # of the model's last layer, with both shapes where the file has other ones
    unused: list[str]

    def __str__(self) -> str:
        text = f"{len(self.tensors)} tensors loaded"
        text += f", the last layer is new ({_some(self.new)})" if self.new else ", the last layer too"
        return text + (f", {len(self.unused)} not used ({_some(self.unused)})" if self.unused else "")


def weights_digest(path: Path) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the file that `read_weights` reads."""
    info = find_checkpoint(path)
    return (info.sha256 if info else sha256_of(_existing(path)))[:16]


def read_weights(path: Path, class_names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Tensors by name, on the CPU: of a run folder, a checkpoint, a .safetensors file, or a state dict of torch.save.

    Of a run that averaged its weights, the average; of a run with other classes than `class_names`, all but the last
    layer. Code in a file is not run (`weights_only`).

    Raises:
        CheckpointError: the file is missing, damaged, or holds no tensors by name.
    """
    info = find_checkpoint(path)
    if info is not None:
        state = load_state(info)
        tensors = dict(state["module"]) | (state["average"]["tensors"] if state["average"] else {})
        is_other = class_names is not None and info.class_names not in {None, tuple(class_names)}
        last = list(state["module"])[-1].rpartition(".")[0]
        return {name: tensor for name, tensor in tensors.items() if not (is_other and name.rpartition(".")[0] == last)}
    read = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    return _without_prefix(read(_existing(path)))


def match_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Matched:
    """Returns the tensors of `weights` that `model` takes. Its last layer may be missing or of other classes.

    Raises:
        CheckpointError: a tensor outside of the last layer is missing or has another shape.
    """
    head, found, new, wrong = in_head(levels(model)), dict[str, Tensor](), list[str](), list[str]()
    for name, own in model.state_dict().items():
        given = weights.get(name)
        if given is not None and given.shape == own.shape:
            found[name] = given
        elif given is not None or not name.endswith(".num_batches_tracked"):  # which old files lack
            shapes = f"{list(own.shape)}, {'not given' if given is None else f'in the file {list(given.shape)}'}"
            (new if name in head else wrong).append(f"{name} {shapes}")
    if wrong:
        raise CheckpointError(
            f"the initial weights do not fit the model: {_some(wrong)}; needed: those of the same model, with the "
            "same image_channels and, of a ResNet, the same stem; --set stem=large is that of torchvision and timm"
        )
    return Matched(found, new, sorted(set(weights) - set(model.state_dict())))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(
            f"--init-from {path}: there is no such file; a run folder, step-*.pt, .safetensors or .pth file works"
        )
    return path


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(f"{path.name} needs safetensors: pip install 'megabatch[safetensors]'") from error
    try:
        return dict(safetensors.torch.load_file(path))
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} could not be read as plain tensors: {type(error).__name__}; a file of "
            "torch.save(model.state_dict(), FILE) works"
        ) from error
    while isinstance(loaded, Mapping) and (inner := next((key for key in _CONTAINERS if key in loaded), None)):
        loaded = loaded[inner]
    tensors = dict(loaded) if isinstance(loaded, Mapping) else {}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path} holds no tensors by name; a file of torch.save(model.state_dict(), FILE) works")
    return tensors


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            return _without_prefix({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
