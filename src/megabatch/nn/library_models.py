"""Models of timm and torchvision by name, with random weights from torch's generator."""

import importlib
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from torch import nn

from megabatch.errors import SettingsError

_TUPLE_OUTPUT = frozenset({"googlenet", "inception_v3"})  # in training their output holds auxiliary logits


def create_library_model(
    library: str, name: str, *, num_classes: int, in_channels: int, image_sizes: tuple[int, ...]
) -> nn.Module:
    """Returns `name` of `library`, "timm" or "torchvision", for images of `in_channels` and `image_sizes` pixels.

    Raises:
        SettingsError: the library cannot be imported, has no such model, or the model cannot take such images.
    """
    create = _create_timm if library == "timm" else _create_torchvision
    return create(_import(library), name, num_classes, in_channels, image_sizes)


def _import(library: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise SettingsError(
            f"model={library}:NAME needs {library}, whose import failed ({error}); `pip install {library}` with the "
            "torchvision of your torch works, as does model=resnet50"
        ) from error


def _create_timm(timm: Any, name: str, num_classes: int, in_channels: int, sizes: tuple[int, ...]) -> nn.Module:
    if not timm.is_model(name):
        raise SettingsError(_unknown("timm", name, timm.list_models()))
    options: dict[str, Any] = {}
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        if len(set(sizes)) > 1:
            raise SettingsError(
                f"model=timm:{name} takes images of one size, and the recipe has {', '.join(map(str, sorted(sizes)))} "
                f"pixels; --set resolution={sizes[-1]} --set eval_resolution={sizes[-1]} works"
            )
        options["img_size"] = sizes[-1]
    model: nn.Module = timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **options)
    return model


def _create_torchvision(
    torchvision: Any, name: str, num_classes: int, in_channels: int, sizes: tuple[int, ...]
) -> nn.Module:
    models = torchvision.models
    names = models.list_models(module=models)
    if name not in names or name in _TUPLE_OUTPUT:
        raise SettingsError(_unknown("torchvision", name, [each for each in names if each not in _TUPLE_OUTPUT]))
    if in_channels != 3:
        raise SettingsError(
            f"model=torchvision:{name} takes images of 3 channels, not {in_channels}; --set image_channels=3 with "
            "three values of pixel_mean and pixel_std works"
        )
    options = {"image_size": sizes[-1]} if name.startswith("vit_") else {}
    model: nn.Module = models.get_model(name, num_classes=num_classes, **options)
    return model


def _unknown(library: str, name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.4) or ["resnet50"]
    return f"model={library}:{name}: {library} has no such classifier; did you mean {library}:{near[0]}?"
