"""Where a computation stopped being finite: what a person needs to know of a run that diverged."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megabatch.train.precision import Precision


def first_not_finite(module: nn.Module, images: Tensor, precision: Precision) -> str:
    """What was the first to hold a value that is not finite, in words: the images, a layer's weights, or its output.

    Runs the forward of `images` once more and looks at every layer in the order of the computation; a layer's name is
    its name in the module. Where all is finite, a gradient is named, and if they are finite too, the loss.
    """
    if not _finite(images):
        return "the input images"
    found: list[str] = []
    with _watching(module, found), torch.no_grad(), precision.autocast():
        module(images)
    return found[0] if found else _first_gradient(module)


@contextmanager
def _watching(module: nn.Module, found: list[str]) -> Iterator[None]:
    """Within the block a forward adds to `found` what is not finite, in the order of the computation."""
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
    def look(layer: nn.Module, _: Any, output: Tensor) -> None:
        if found:
            return
        for parameter_name, parameter in layer.named_parameters(recurse=False):
            if not _finite(parameter):
                found.append(f"the {parameter_name} of {name}")
                return
        if not _finite(output):
            found.append(f"the output of {name}")

    return look


def _first_gradient(module: nn.Module) -> str:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {name}"
    return "the loss"


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
