"""Recipes as TOML files: every field with its comment, edited by hand. Imports no torch.

A value is written as in TOML: `peak_lr = 2.0`, `flip = true`, `resolution = [[0, 160], [13, 192]]`; "none" is no value.
Fields that a file leaves out have the defaults of `Recipe`.
"""

import inspect
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

from megabatch.errors import RecipeError
from megabatch.recipe import Recipe, parse_settings
from megabatch.recipe_validation import validate

SUFFIX = ".toml"
_FIELD = re.compile(r"    (\w+): [^#]*(#.*)?$")
_HEADING = re.compile(r"    (#.*)$")
_NAME = re.compile(r"[\w][\w.+-]*")


def to_toml(recipe: Recipe, about: str = "") -> str:
    """Returns every field of `recipe` as TOML, below `about` as comments; `read_toml` is the inverse."""
    lines = [f"# {line}".rstrip() for line in about.splitlines()]
    for line in inspect.getsource(Recipe).partition('"""\n\n')[2].partition("    def ")[0].splitlines():
        if field := _FIELD.match(line):
            comment = f"  {field[2]}" if field[2] else ""
            lines.append(f"{field[1]} = {_toml_value(getattr(recipe, field[1]))}{comment}")
        elif heading := _HEADING.match(line):
            lines += ["", heading[1]]
    return "\n".join(lines).lstrip("\n") + "\n"


def read_toml(path: Path) -> Recipe:
    """Returns the recipe in a TOML file.

    Raises:
        RecipeError: there is no such file, it is not TOML, a key is unknown, a value has the wrong type, a field
            without a default is missing, or values contradict each other.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"there is no recipe file {path}; `megabatch recipes photos --format toml > {shlex.quote(str(path))}` works"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not a TOML file: {error}; flip = true works") from None
    try:
        fields = parse_settings({key: _text(key, value) for key, value in values.items()})
        recipe = validate(Recipe(**fields))
    except TypeError as error:  # fields without a default
        missing = str(error).partition(": ")[2]
        raise RecipeError(
            f"{path} lacks {missing}; `megabatch recipes NAME --format toml` writes every field"
        ) from None
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from None
    if not _NAME.fullmatch(recipe.name):
        raise RecipeError(
            f"{path}: name={recipe.name} names the run folder: needed letters, digits, '.', '_', '+' or '-'"
        )
    return recipe


def _toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if value is None:
        return '"none"'
    return repr(value) if isinstance(value, float) else json.dumps(value)


def _text(key: str, value: Any) -> str:
    """Returns a TOML value as `--set` takes it, without rounding."""
    if isinstance(value, list):
        return ",".join(
            ":".join(_number(key, part) for part in x) if isinstance(x, list) else _number(key, x) for x in value
        )
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else _number(key, value)


def _number(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(
            f"{key}={value!r}: needed a number, true, false, a text, or a list of numbers or pairs of numbers"
        )
    return repr(value)
