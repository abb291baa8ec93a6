"""What several verbs share: `KEY=VALUE` pairs and choices, refused with a value that works."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from megabatch.errors import RecipeError, SettingsError

if TYPE_CHECKING:
    import torch

Choice = TypeVar("Choice", bound=str)

SET_HELP = "KEY=VALUE of the recipe, as peak_lr=2; repeatable. `megabatch recipes NAME` shows every key."
CACHE_HELP = "Where fetched data sets and shards are kept; default ~/.cache/megabatch."


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """`["peak_lr=2", ...]` as a dict; RecipeError for what is no pair or given twice."""
    settings: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {pair}: needed KEY=VALUE, for example --set total_epochs=5")
        if key in settings:
            raise RecipeError(f"--set {key} was given twice ({settings[key]} and {value}); give it once")
        settings[key] = value
    return settings


def require_choice(option: str, given: str, choices: Sequence[Choice]) -> Choice:
    """`given`, if it is one of `choices`; SettingsError naming them otherwise."""
    for choice in choices:
        if choice == given:
            return choice
    raise SettingsError(f"{option} {given}: needed one of {', '.join(choices)}; {option} {choices[0]} works")


def parse_data(text: str | None) -> Path | str | None:
    """A path, or a URL as it is: as a path it would lose one of its slashes."""
    return text if text is None or "://" in text else Path(text)


def parse_workers(text: str) -> int | None:
    """A number of workers, or None for `auto`; SettingsError otherwise."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise SettingsError(f"--workers {text}: needed a whole number of at least 1, or auto; --workers 2 works")
    return int(text)


def parse_loss_scale(text: str) -> float | None:
    """A number, or None for `dynamic`; SettingsError otherwise. Whether the number will do is for the run to say."""
    if text == "dynamic":
        return None
    try:
        return float(text)
    except ValueError:
        raise SettingsError(f"--loss-scale {text}: needed dynamic or a power of two; --loss-scale 1024 works") from None


def device_here(wanted: str) -> "torch.device":
    """What one worker on this machine would compute on; SettingsError where it is not there.

    For the process that starts local workers: each of them would say so for itself.
    """
    from megabatch.comm.launch import join

    with join(device=wanted) as world:
        return world.device
