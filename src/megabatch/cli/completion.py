"""Shell completion of recipes, choices, and `--set KEY=VALUE`; no torch."""

import os
import types
import typing
from collections.abc import Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megabatch import recipes
from megabatch.model_names import LIBRARIES, MODELS
from megabatch.recipe import Recipe

_KEY = "_MEGABATCH_COMPLETED_KEY"
"""Environment variable with the key of a `KEY=VALUE` whose value bash completes."""


def complete_recipe(incomplete: str) -> list[str]:
    """Returns the recipes, and the recipe files in this folder, whose names begin with `incomplete`."""
    files = sorted(str(path) for path in Path().glob("*.toml"))
    return [name for name in (*recipes.names(), *files) if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """Returns the models that begin with `incomplete`, and the prefixes of other packages' models."""
    return complete_from((*MODELS, *(f"{library}:" for library in LIBRARIES)))(incomplete)


def complete_from(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """Returns a function that gives those of `choices` that begin with an incomplete word."""
    return lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """Returns `KEY=VALUE` for each value of a chosen key, or of the only key that fits; otherwise keys with `=`.

    bash takes `=` for the end of a word: the key is then in the environment, and the values are returned alone.
    """
    if key := os.environ.get(_KEY):
        return complete_from(_values(key))(incomplete)
    key, equals, _ = incomplete.partition("=")
    keys = [field for field in typing.get_type_hints(Recipe) if field == key or (field.startswith(key) and not equals)]
    if len(keys) > 1:
        return [f"{field}=" for field in keys]
    values = [f"{field}={value}" for field in keys for value in _values(field) or ("", "VALUE")]
    return complete_from(values)(incomplete)


def _values(key: str) -> Sequence[str]:
    """Words that the recipe field takes; empty for numbers and unknown keys. VALUE, with the key alone, keeps a shell
    from adding a space after the sign.
    """
    if key == "model":
        return complete_model("")
    hint = typing.get_type_hints(Recipe).get(key)
    return ("true", "false") if hint is bool else _words(hint)


def _words(hint: Any) -> tuple[str, ...]:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    members = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else ()
    return tuple(word for member in members for word in _words(member))


def join_bash_words(environment: MutableMapping[str, str]) -> None:
    """Undoes bash's cut of `KEY=VALUE` into three words in the variables of a completion.

    The value to complete becomes a word of its own, with its key in another variable.
    """
    if environment.get("_MEGABATCH_COMPLETE") != "complete_bash":
        return
    words, last = environment.get("COMP_WORDS", "").split("\n"), int(environment.get("COMP_CWORD", "0"))
    before, current = words[:last], words[last] if last < len(words) else ""
    if current == "=":
        before, current = [*before, "="], ""
    if before[-1:] == ["="]:
        *before, key, _ = before
        if key.startswith("-"):
            before.append(key)
        else:
            environment[_KEY] = key
    joined: list[str] = []
    for word in before:
        if joined and (word == "=" or joined[-1].endswith("=")):
            joined[-1] += word
        else:
            joined.append(word)
    environment["COMP_WORDS"], environment["COMP_CWORD"] = "\n".join([*joined, current]), str(len(joined))
