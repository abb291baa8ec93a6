"""Matches the classes of a data set with those of a checkpoint, by name.

Labels of a data set are numbered by its own class names; a model's logits by those of its training set. Data whose
classes have other numbers are renumbered, so that label k always means the model's class k. Two cases have no names to
compare, and match by number if there are equally many classes: a checkpoint of a version that stored no names, and a
data set that has only the numbers 0 to K - 1 where the other side has names (tars or parquet files without names).
"""

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from megabatch.app.data import Data, Source
from megabatch.data.sources.arrays import ArraySource
from megabatch.errors import DataError
from megabatch.train.checkpoint import CheckpointInfo

Names = tuple[str, ...]

_SHOWN = 3  # names of each side in a message


def match_training_data(data: Data, checkpoint: CheckpointInfo) -> tuple[Data, str | None]:
    """Returns `data` with its labels numbered as in `checkpoint`, and a remark if names could not be compared.

    Raises:
        DataError: the training data's classes are not exactly those of the checkpoint.
    """
    names, numbers, remark = _match(data.train.class_names, checkpoint)
    if len(numbers) != checkpoint.num_classes:
        missing = [name for index, name in enumerate(names) if index not in numbers]
        raise DataError(
            f"the data lacks classes of the checkpoint: {_some(missing)}; the data it was trained on works, or a new "
            "model with another --output"
        )
    evaluation = _match(data.evaluation.class_names, checkpoint)
    train = _renumbered(data.train, names, numbers)
    return dataclasses.replace(data, train=train, evaluation=_renumbered(data.evaluation, *evaluation[:2])), remark


def match_evaluation_data(source: Source, checkpoint: CheckpointInfo) -> tuple[Source, list[str]]:
    """Returns `source` with its labels numbered as in `checkpoint`, and remarks for the user.

    The data may lack classes of the model, which a remark names.

    Raises:
        DataError: the data has classes that the model does not know.
    """
    names, numbers, remark = _match(source.class_names, checkpoint)
    source = _renumbered(source, names, numbers)
    present = np.bincount(np.asarray(source.labels), minlength=checkpoint.num_classes) > 0
    missing = [name for name, is_present in zip(names, present, strict=True) if not is_present]
    remarks = [remark] if remark else []
    if missing:
        remarks.append(
            f"the data has images of {present.sum()} of the model's {len(names)} classes; no {_some(missing)}"
        )
    return source, remarks


def _match(data: Names, checkpoint: CheckpointInfo) -> tuple[Names, list[int], str | None]:
    """Returns the model's class names, the model's number of each class of the data, and a remark or None."""
    model, count = checkpoint.class_names, checkpoint.num_classes
    if model is None:
        _require_count(data, count)
        return (
            data,
            list(range(count)),
            f"the checkpoint stores no class names: only their number, {count}, was compared",
        )
    number = {name: index for index, name in enumerate(model)}
    if all(name in number for name in data):
        return model, [number[name] for name in data], None
    if _only_numbers(data) and not _only_numbers(model):
        _require_count(data, count)
        remark = f"the data has no class names: labels 0 to {count - 1} are taken as the classes {_some(model)}"
        return model, [int(name) for name in data], remark
    if _only_numbers(model) and not _only_numbers(data):
        _require_count(data, count)
        remark = f"the checkpoint has no class names: its classes 0 to {count - 1} are taken as {_some(data)}"
        return model, [number[str(index)] for index in range(count)], remark
    unknown = [name for name in data if name not in number]
    raise DataError(
        f"the data has classes that the checkpoint does not know: {_some(unknown)}; its classes are {_some(model)}; "
        "data of these classes works, or a new model from `megabatch train` with another --output"
    )


def _only_numbers(names: Sequence[str]) -> bool:
    """True if the names are the numbers 0 to K - 1, in any order."""
    return set(names) == {str(index) for index in range(len(names))}


def _require_count(data: Names, count: int) -> None:
    if len(data) != count:
        raise DataError(
            f"the data has {len(data)} classes, the checkpoint {count}, and without names they cannot be matched; "
            "the data it was trained on works"
        )


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def _renumbered(source: Source, names: Names, numbers: Sequence[int]) -> Source:
    """`source` with class k of its own as class `numbers[k]` of `names`; the images and open files are shared."""
    if source.class_names == names and list(numbers) == list(range(len(names))):
        return source
    if isinstance(source, ArraySource):
        table = torch.tensor(numbers, device=source.labels.device)
        return ArraySource(source.images, table[source.labels], names)
    renumbered = copy.copy(source)
    vars(renumbered).update(class_names=names, labels=np.asarray(numbers, dtype=np.int64)[source.labels])
    return renumbered
