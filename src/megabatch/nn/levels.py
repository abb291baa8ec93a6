"""Levels of a model, from its first layers to its head, for rates by layer and for freezing."""

import re
from collections.abc import Mapping

from torch import nn

from megabatch.nn.batch_norm.layer import SpanBatchNorm2d

_BLOCK = re.compile(r"[^.]+\.\d+(?=\.)")


def levels(model: nn.Module) -> dict[str, int]:
    """Level of each parameter by name: 0 in the stem, then one more per block, and the highest in the head.

    A block is a numbered child of a top-level child, such as `layer1.0` or `blocks.11`; a parameter outside blocks has
    the level of the block before it. The head is the module that holds the last parameter. Both follow the order of
    registration, which is that of the layers in timm, torchvision and `megabatch.nn`.
    """
    names = [name for name, _ in model.named_parameters()]
    head, level, found, seen = _module_of(names[-1]), 0, dict[str, int](), set[str]()
    for name in names:
        block = _BLOCK.match(name)
        if block and block[0] not in seen and _module_of(name) != head:
            seen.add(block[0])
            level += 1
        found[name] = level
    return {name: level + 1 if _module_of(name) == head else of_block for name, of_block in found.items()}


def in_head(found: Mapping[str, int]) -> set[str]:
    """Names of the parameters of the highest of these levels."""
    highest = max(found.values())
    return {name for name, level in found.items() if level == highest}


def freeze_backbone(model: nn.Module) -> None:
    """Excludes all parameters but those of the head from training, in place.

    Span batch norms outside of the head normalise by their running averages from now on, also in training.
    """
    head = in_head(levels(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
    for name, layer in model.named_modules():
        if isinstance(layer, SpanBatchNorm2d) and f"{name}.weight" not in head:
            layer.__class__ = _frozen(type(layer))
            layer.eval()


def _frozen(kind: type[SpanBatchNorm2d]) -> type[SpanBatchNorm2d]:
    """A subclass that stays in evaluation mode."""

    def train(self: SpanBatchNorm2d, mode: bool = True) -> SpanBatchNorm2d:  # noqa: ARG001 - it stays as it is
        return kind.train(self, False)

    return type(f"Frozen{kind.__name__}", (kind,), {"train": train, "is_frozen": True})


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]
