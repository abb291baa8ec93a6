"""Class numbers and class names of labels that were stored as numbers or as names: one rule for tars and parquet."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from megabatch.data.sources.protocol import EncodedSource
from megabatch.errors import DataError

MOST_CLASSES = 1_000_000
_FEWEST_USED = 0.1  # share of the classes that training images of numeric labels must have
_NEGATIVE = re.compile(r"-\d+")


class ClassNote(str):
    """A note on classes that a part of a data set lacks; evaluation compares with the model's classes instead."""

    __slots__ = ()


@dataclass(frozen=True)
class Classes:
    """Class number of each distinct label, and the class names; `numbered` if these are only the numbers."""

    number: Mapping[Any, int]
    names: tuple[str, ...]
    numbered: bool


def find_classes(places: Mapping[Any, str], names: Sequence[str] | None, *, where: str) -> Classes:
    """Returns the classes that distinct labels mean.

    If all labels are numbers, in text or not, they are class numbers from 0, and `names` are the names of those
    classes. Otherwise labels are names: of the classes `names`, or by default of classes in the order of their names.

    Args:
        places: the distinct labels, each with the file where it was found.
        names: class names, if the data set lists them.
        where: the data set.

    Raises:
        DataError: a label is missing, negative, a fraction, or not among `names`; a name is listed twice; or numbers
            are so large that they must be identifiers.
    """
    if names is not None:
        _refuse_repeated(names, where)
    texts = {value: _text(value, place) for value, place in places.items()}
    if not all(text.isdecimal() for text in texts.values()):
        names = names or sorted(set(texts.values()))
        return Classes(_by_name(texts, names, places), tuple(names), numbered=False)
    numbers = {value: int(text) for value, text in texts.items()}
    count = max(numbers.values(), default=-1) + 1
    if names is not None and count > len(names):  # identifiers, all of them listed, or labels that are not
        return Classes(_by_name(texts, names, places), tuple(names), numbered=False)
    if count > MOST_CLASSES:
        raise DataError(_identifiers(where, count - 1, len(numbers)))
    return Classes(numbers, tuple(names or map(str, range(count))), numbered=names is None)


def read_class_names(text: str) -> list[str]:
    """Class names in the text of a `classes.txt`, one per line; a last newline and a byte order mark are ignored."""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n")
    return lines.split("\n")


def agree_on_classes(sources: Mapping[str, EncodedSource], where: str, *, numbered: bool) -> list[str]:
    """Gives all parts of a data set the classes of the first, matched by name; returns what a user should know.

    If classes are `numbered`, because the data set names none, the part with the highest label has all of them.

    Raises:
        DataError: another part has a class that the first lacks; or most numeric labels are unused, as identifiers are.
    """
    names = next(iter(sources.values())).class_names
    if numbered:
        names = max((source.class_names for source in sources.values()), key=len)
        _refuse_identifiers(sources.values(), where)
    for part, source in sources.items():
        _refuse_new_classes(part, source.class_names, next(iter(sources)), names, where)
        _rename(source, names)
    return [note for part, source in sources.items() if (note := _missing_classes(part, source))]


def _text(value: Any, where: str) -> str:
    """A label as text; numbers without a fraction, also as floats, become whole numbers."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool):
        value = int(value)
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
    text = text.strip()
    if value is None or not text or isinstance(value, float):
        raise DataError(f"{where}: a label is {value!r}; each image needs a class, as a number from 0 or as a name")
    if _NEGATIVE.fullmatch(text):
        raise DataError(
            f"{where}: label {text} is not a class; needed: numbers from 0, or names. If {text} means that an image "
            "has no class, leave such images out"
        )
    return text


def _by_name(texts: Mapping[Any, str], names: Sequence[str], places: Mapping[Any, str]) -> dict[Any, int]:
    number = {name: i for i, name in enumerate(names)}
    unknown = [value for value, text in texts.items() if text not in number]
    if unknown:
        value = max(unknown, key=lambda value: (len(texts[value]), texts[value]))  # of numbers the largest
        classes = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise DataError(
            f"{places[value]}: label '{texts[value]}' is neither a class name nor a number below {len(names)}; the "
            f"classes are {classes}"
        )
    return {value: number[text] for value, text in texts.items()}


def _refuse_repeated(names: Sequence[str], where: str) -> None:
    repeated = next((a for a, b in pairwise(sorted(names)) if a == b), None)
    if repeated is not None:
        raise DataError(f"{where}: two classes are named '{repeated}'; each class needs a name of its own")


def _refuse_new_classes(part: str, found: Sequence[str], first: str, names: Sequence[str], where: str) -> None:
    new = sorted(set(found) - set(names))
    if new:
        more = f" and {len(new) - 1} more are" if len(new) > 1 else " is"
        raise DataError(
            f"{where}: the classes of {first} and {part} differ: '{new[0]}'{more} only in {part} ({len(names)} and "
            f"{len(found)} classes); a model learns the classes of {first}, so each class of {part} must be there"
        )


def _rename(source: EncodedSource, names: tuple[str, ...]) -> None:
    """Numbers the labels of a source by `names`, which contain all of its class names."""
    if source.class_names == names:
        return
    number = {name: i for i, name in enumerate(names)}
    new = np.array([number[name] for name in source.class_names], dtype=np.int64)
    source.labels, source.class_names = new[source.labels], names  # type: ignore[misc]


def _refuse_identifiers(sources: Iterable[EncodedSource], where: str) -> None:
    used = np.unique(np.concatenate([np.unique(source.labels) for source in sources]))
    if used.size and used.size < _FEWEST_USED * (used[-1] + 1):
        raise DataError(_identifiers(where, int(used[-1]), used.size))


def _identifiers(where: str, largest: int, used: int) -> str:
    return (
        f"{where}: labels go up to {largest:,}, but only {used:,} of them are used, as if they were identifiers; "
        "needed: class numbers 0, 1, 2, ..., or names. A file classes.txt beside tars names the classes, one per line, "
        "and may list such identifiers"
    )


def _missing_classes(part: str, source: EncodedSource) -> ClassNote | None:
    used = np.zeros(len(source.class_names), dtype=bool)
    used[source.labels] = True
    missing = np.flatnonzero(~used)
    if not missing.size:
        return None
    named = ", ".join(f"'{source.class_names[i]}'" for i in missing[:3].tolist())
    more = ", ..." if missing.size > 3 else ""
    return ClassNote(f"{part} has no images of {missing.size} of the {used.size} classes: {named}{more}")
