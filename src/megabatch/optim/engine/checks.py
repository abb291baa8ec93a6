"""Checks of a parameter group's values. Values of tensors are not read, since that would synchronise the device."""

from typing import Any

from torch import Tensor

from megabatch.errors import UserError

Group = dict[str, Any]


def check_number(group: Group, name: str, *, low: float, below: float = float("inf"), example: float) -> None:
    """Raises UserError unless low <= group[name] < below or, for a tensor, unless it has one element."""
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
    """Raises UserError unless group[name] is one of `choices`."""
    if group[name] not in choices:
        raise UserError(
            f"{name}={group[name]!r} was given, needed one of {', '.join(choices)}; {name}={choices[0]!r} works"
        )


def check_backend(group: Group) -> None:
    """Raises UserError if `fused` and `foreach` select two backends, or if a CUDA graph would freeze the rate."""
    if group["fused"] and group["foreach"] is not None:
        raise UserError(
            f"fused=True and foreach={group['foreach']} select two backends; fused=True with foreach=None works"
        )
    if group["capturable"] and not isinstance(group["lr"], Tensor):
        raise UserError(
            "capturable=True was given with a float rate, which a CUDA graph would freeze; needed: a tensor on the "
            "parameters' device, for example lr=torch.tensor(0.1, device='cuda')"
        )
