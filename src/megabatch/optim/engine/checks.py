"""Checks of a parameter group's values. Tensors are not read: that would wait for the device."""

from typing import Any

from torch import Tensor

from megabatch.errors import UserError

Group = dict[str, Any]


def check_number(group: Group, name: str, *, low: float, below: float = float("inf"), example: float) -> None:
    """UserError unless low <= group[name] < below; of a tensor, unless it has one element."""
    value = group[name]
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise UserError(
                f"{name} has {value.numel()} elements, needed: a number or a 0-d tensor; {name}={example} works"
            )
        return
    if not low <= value < below:
        raise UserError(
            f"{name}={value} was given, needed: at least {low}, below {below}; for example {name}={example}"
        )


def check_choice(group: Group, name: str, choices: tuple[str, ...]) -> None:
    """UserError unless group[name] is one of `choices`."""
    if group[name] not in choices:
        raise UserError(
            f"{name}={group[name]!r} was given, needed one of {', '.join(choices)}; {name}={choices[0]!r} works"
        )


def check_ways(group: Group) -> None:
    """UserError where `fused` and `foreach` ask for two ways at once, or a CUDA graph would freeze the rate."""
    if group["fused"] and group["foreach"] is not None:
        raise UserError(
            f"fused=True and foreach={group['foreach']} ask for two ways at once; foreach=None with fused=True works"
        )
    if group["capturable"] and not isinstance(group["lr"], Tensor):
        raise UserError(
            "capturable=True with a float rate, which a CUDA graph would freeze; needed: a tensor on the parameters' "
            "device, for example lr=torch.tensor(0.1, device='cuda')"
        )
