"""Writes a trained model to a file of each format, reads the file back and compares the logits."""

import importlib
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from megabatch.app.export.trained import PixelModel, Trained, plain_network
from megabatch.errors import MegabatchError, SettingsError
from megabatch.files import replacing

Format = Literal["safetensors", "torchvision", "onnx", "torch-export"]
Logits = Callable[[Tensor], Tensor]

TOLERANCE = 1e-4
"""Largest allowed difference of a file's logits from the model's, relative to the largest logit, at least 1."""

_TORCHVISION_MODELS = frozenset({"resnet18", "resnet34", "resnet50"})


def export(model: Trained, path: Path, output_format: Format) -> float:
    """Writes `path` and returns the largest relative difference of the file's logits from the model's.

    Raises:
        SettingsError: a package is missing, or the format cannot hold this model.
        MegabatchError: the logits differ by more than `TOLERANCE`; nothing is written.
    """
    form = FORMATS[output_format]
    images = model.sample_images()
    expected = model.pixel_model(images)
    with replacing(path) as part:
        form.write(model, part)
        found = form.read(model, part)(images)
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        if not difference <= TOLERANCE:
            raise MegabatchError(
                f"logits of the {output_format} file differ by {difference:.1g}, more than {TOLERANCE}"
            )
    return difference


def _write_safetensors(model: Trained, path: Path) -> None:
    weights = {name: tensor.contiguous() for name, tensor in model.pixel_model.network.state_dict().items()}
    _needs("safetensors.torch", "safetensors").save_file(weights, path, metadata=model.facts() | {"format": "pt"})


def _read_safetensors(model: Trained, path: Path) -> Logits:
    return _with_weights(model, _needs("safetensors.torch", "safetensors").load_file(path))


def _write_torchvision(model: Trained, path: Path) -> None:
    recipe, network = model.recipe, model.pixel_model.network
    stem = getattr(network, "conv1", None)
    is_large = isinstance(stem, nn.Conv2d) and stem.kernel_size == (7, 7) and stem.in_channels == 3
    if recipe.model not in _TORCHVISION_MODELS or not is_large or recipe.blur_pool:
        raise SettingsError(
            f"torchvision has no model like this {recipe.model}: needed resnet18, 34 or 50 with stem=large, 3 channels "
            "and without blur_pool; --format safetensors works"
        )
    facts = {name: json.loads(text) for name, text in model.facts().items()}
    torch.save({"model": network.state_dict()} | facts, path)


def _read_torchvision(model: Trained, path: Path) -> Logits:
    return _with_weights(model, torch.load(path, weights_only=True)["model"])


def _with_weights(model: Trained, weights: dict[str, Tensor]) -> Logits:
    network = plain_network(model.recipe, model.code)
    network.load_state_dict(weights)
    return PixelModel(network.requires_grad_(False), model.recipe).eval()


def _program(model: Trained) -> torch.export.ExportedProgram:
    """The model as a graph of operations, for any number of images."""
    batch = torch.export.Dim("batch")
    return torch.export.export(model.pixel_model, (model.sample_images(2),), dynamic_shapes=({0: batch},))


def _write_torch_export(model: Trained, path: Path) -> None:
    files = {f"{name}.json": text for name, text in model.facts().items()}
    with path.open("wb") as file:
        torch.export.save(_program(model), file, extra_files=files)


def _read_torch_export(_: Trained, path: Path) -> Logits:
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _write_onnx(model: Trained, path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _needs(package, "onnx")
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # a missing torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within the exporter
        program = torch.onnx.export(_program(model), input_names=["images"], output_names=["logits"], verbose=False)
    assert program is not None
    program.model.metadata_props.update(model.facts())
    program.save(path)


def _read_onnx(_: Trained, path: Path) -> Logits:
    session = _needs("onnxruntime", "onnx").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _needs(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(
            f"this format needs the package {error.name}; `pip install 'megabatch[{extra}]'` installs it"
        ) from None


@dataclass(frozen=True)
class _Form:
    file: str
    write: Callable[[Trained, Path], None]
    read: Callable[[Trained, Path], Logits]


FORMATS: dict[Format, _Form] = {
    "safetensors": _Form("model.safetensors", _write_safetensors, _read_safetensors),
    "torchvision": _Form("torchvision.pth", _write_torchvision, _read_torchvision),
    "onnx": _Form("model.onnx", _write_onnx, _read_onnx),
    "torch-export": _Form("model.pt2", _write_torch_export, _read_torch_export),
}
"""File name, writer and reader of each format."""
