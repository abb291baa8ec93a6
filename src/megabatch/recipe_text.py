"""Values of recipe fields as text: `--set key=value` is parsed by the field's annotation and formatted back."""

import math
import sys
import types
import typing
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal

COMMON_NAMES = {
    "arch": "model",
    "base_lr": "peak_lr",
    "batch": "global_batch_size",
    "batch_size": "global_batch_size",
    "epochs": "total_epochs",
    "image_size": "resolution",
    "img_size": "resolution",
    "learning_rate": "peak_lr",
    "lr": "peak_lr",
    "num_epochs": "total_epochs",
    "wd": "weight_decay",
}
"""Names that other training scripts use, and the recipe field of the same meaning; suggested for an unknown key."""


def suggestion(key: str, fields: Sequence[str]) -> str:
    """Returns the field that an unknown key may mean, as a question, or how to list all fields."""
    near = [COMMON_NAMES[key]] if key in COMMON_NAMES else get_close_matches(key, fields, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else "`megabatch recipes NAME` shows every key"


def parse(text: str, hint: Any) -> Any:
    """Returns `text` as a value of the annotation `hint`, that of a field of `Recipe`.

    Raises:
        ValueError: the text is not of that type; the message says what is needed.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if text not in args:
            raise ValueError(f"needed one of {', '.join(args)}")
        return text
    if origin is types.UnionType:  # `float | None`, the only kind of union in a recipe
        return None if text.lower() in {"none", ""} else parse(text, args[0])
    if origin is tuple:
        return _parse_tuple(text, args[0])
    if hint is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError("needed true or false")
        return words[text.lower()]
    if hint is int:
        return _parse_int(text)
    if hint is float:
        return _parse_float(text)
    return text


def conforms(value: object, hint: Any) -> bool:
    """True if `value` is of the annotation `hint`, with finite numbers; a whole number is also a float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in args
    if origin is types.UnionType:
        return any(conforms(value, arg) for arg in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return len(value) == len(hints) and all(map(conforms, value, hints))
    if hint is float:
        return type(value) in {int, float} and abs(value) <= sys.float_info.max  # type: ignore[arg-type]
    if hint is int:
        return type(value) is int and abs(value) <= sys.maxsize
    return type(value) is hint


def _parse_int(text: str) -> int:
    try:
        number = int(text.replace("_", ""))
    except ValueError:
        raise ValueError("needed a whole number") from None
    if abs(number) > sys.maxsize:
        raise ValueError("needed a whole number of at most 18 digits")
    return number


def _parse_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise ValueError("needed a number") from None
    if not math.isfinite(number):
        raise ValueError("needed a finite number")
    return number


def _parse_tuple(text: str, item: Any) -> tuple[Any, ...]:
    if typing.get_origin(item) is tuple:
        return _parse_by_epoch(text)
    return tuple(_parse_float(part) for part in text.split(",") if part)


def _parse_by_epoch(text: str) -> tuple[tuple[float, float], ...]:
    if not text or text.lower() == "none":
        return ()
    parts = text.split(",")
    if len(parts) == 1 and ":" not in text:  # one value for all epochs
        return ((0.0, _parse_float(text)),)
    pairs = [part.partition(":") for part in parts]
    if not all(colon for _, colon, _ in pairs):
        raise ValueError("needed epoch:value pairs such as 0:160,13:192")
    return tuple((_parse_float(epoch), _parse_float(value)) for epoch, _, value in pairs)


def as_text(value: object, *, max_items: int | None = None) -> str:
    """Returns a field's value as `--set` takes it; a tuple longer than `max_items` is abbreviated."""
    if isinstance(value, tuple):
        items = [":".join(f"{v:g}" for v in x) if isinstance(x, tuple) else f"{x:g}" for x in value]
        if max_items is not None and len(items) > max_items:
            items = [*items[:3], "...", items[-1]]
        return ",".join(items) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
