"""Options of several verbs: one per field of `Runtime`, `--set KEY=VALUE`, and choices."""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from megabatch.cli.completion import complete_from, complete_model, complete_setting
from megabatch.errors import RecipeError, SettingsError
from megabatch.runtime import Device, Runtime

if TYPE_CHECKING:
    import torch

Choice = TypeVar("Choice", bound=str)

SET_HELP = "KEY=VALUE of the recipe, as peak_lr=2; repeatable. `megabatch recipes NAME` shows every key."
Settings = Annotated[list[str] | None, typer.Option("--set", help=SET_HELP, autocompletion=complete_setting)]
HINTS = typing.get_type_hints(Runtime)
DEVICES = typing.get_args(Device)
_SWITCHES = {False: "off", True: "on"}
CACHE_HELP = {field.name: field.metadata["help"] for field in dataclasses.fields(Runtime)}["cache"]


def runtime_options(*names: str, **texts: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replaces the parameter `runtime: Runtime` of a typer command by one option per field of `Runtime`.

    With `names`, only by those fields; the others keep their defaults. `texts`: fields with other help texts.
    """
    chosen = {*names, *texts}
    fields = [field for field in dataclasses.fields(Runtime) if not chosen or field.name in chosen]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_options(**given: Any) -> None:
            values = {field.name: _parse(field, given.pop(field.name)) for field in fields}
            command(runtime=Runtime(**values), **given)

        options = [_parameter(field, texts.get(field.name, field.metadata["help"])) for field in fields]
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            parameters += options if parameter.name == "runtime" else [parameter]
        by_keyword = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        with_options.__signature__ = inspect.Signature(by_keyword)  # type: ignore[attr-defined]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorate


def _parameter(field: dataclasses.Field[Any], text: str) -> inspect.Parameter:
    """The field as a parameter that typer turns into an option."""
    facts = field.metadata
    default, kind = field.default, _plain_type(HINTS[field.name])
    if choices := _choices(field.name):
        text += f" One of {', '.join(choices)}."
        kind, default = str, _SWITCHES[default] if isinstance(default, bool) else default
    elif facts["none"]:
        kind, default = str, facts["none"]  # a number or that word; `_parse` tells them apart
    limits = {} if kind not in {int, float} else {"min": facts["least"], "max": facts["most"]}
    kind = kind | None if default is None else kind
    words = complete_model if field.name == "model" else complete_from(choices) if choices else None
    annotation = Annotated[kind, typer.Option(help=text, autocompletion=words, **limits)]  # type: ignore[valid-type]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _plain_type(hint: Any) -> Any:
    """The type without None; a field that is a path or a URL is read as text."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return str if str in members else members[0]


def _choices(name: str) -> tuple[str, ...]:
    """Words of a field that is a Literal, or bool or a Literal."""
    hint = HINTS[name]
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    words = [word for member in typing.get_args(hint) for word in typing.get_args(member)]
    return (*_SWITCHES.values(), *words) if words else ()


def _parse(field: dataclasses.Field[Any], value: Any) -> Any:
    option = f"--{field.name.replace('_', '-')}"
    if choices := _choices(field.name):
        chosen = require_choice(option, value, choices)
        return chosen == "on" if isinstance(field.default, bool) and chosen in _SWITCHES.values() else chosen
    if none := field.metadata["none"]:
        return None if value == none else _parse_number(option, value, field)
    return parse_data(value) if field.name == "data" else value


def _parse_number(option: str, text: str, field: dataclasses.Field[Any]) -> float:
    """An int or float as the field's type wants; SettingsError otherwise."""
    kind, least, none = _plain_type(HINTS[field.name]), field.metadata["least"], field.metadata["none"]
    try:
        number: float = kind(text)
    except ValueError:
        number = float("nan")
    if not number >= least:
        needed = "a whole number" if kind is int else "a number"
        raise SettingsError(f"{option} {text}: needed {needed} of at least {least:g}, or {none}; {option} {none} works")
    return number


def parse_settings(pairs: Sequence[str]) -> dict[str, str]:
    """Returns `["peak_lr=2", ...]` as a dict; raises RecipeError for what is not a pair or is given twice."""
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
    """Returns `given` if it is one of `choices`; raises SettingsError, which lists them, otherwise."""
    for choice in choices:
        if choice == given:
            return choice
    raise SettingsError(f"{option} {given}: needed one of {', '.join(choices)}; {option} {choices[0]} works")


def parse_data(text: str | None) -> Path | str | None:
    """Returns a path, or a URL as text: a Path would merge its slashes."""
    return text if text is None or "://" in text else Path(text)


def find_device(wanted: Device) -> "torch.device":
    """Returns the device that one worker on this machine would use; raises SettingsError if it is missing.

    Called before local workers start, so that the error is reported once.
    """
    from megabatch.comm.launch import join

    with join(device=wanted) as world:
        return world.device
