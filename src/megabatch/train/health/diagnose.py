"""Locates the first non-finite value of a diverged run."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megabatch.train.precision import Precision


def first_not_finite(module: nn.Module, images: Tensor, precision: Precision) -> str:
    """Describes the first tensor with a non-finite value: the images, or a layer's parameter or output.

    Repeats the forward of `images` and checks every layer in order of execution; layers have their names in the module.
    If all of them are finite, a gradient is named, and if those are finite too, the loss.
    """
    if not _finite(images):
        return "the input images"
    found: list[str] = []
    with _watching(module, found), torch.no_grad(), precision.autocast():
        module(images)
    return found[0] if found else _first_gradient(module)


@contextmanager
def _watching(module: nn.Module, found: list[str]) -> Iterator[None]:
    """Within the block a forward appends descriptions of non-finite tensors to `found`, in order of execution."""
    hooks = []
    for name, layer in module.named_modules():
        if not list(layer.children()):
            hooks.append(layer.register_forward_hook(_watcher(name, found)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _watcher(name: str, found: list[str]) -> Any:
    def check(layer: nn.Module, _: Any, output: Tensor) -> None:
        if found:
            return
        for parameter_name, parameter in layer.named_parameters(recurse=False):
            if not _finite(parameter):
                found.append(f"the {parameter_name} of {name}")
                return
        if not _finite(output):
            found.append(f"the output of {name}")

    return check


def _first_gradient(module: nn.Module) -> str:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {name}"
    return "the loss"


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
