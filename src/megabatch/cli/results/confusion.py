"""A confusion matrix as text: accuracy by class, and what each class is taken for."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megabatch.files import printable, replacing

if TYPE_CHECKING:
    from megabatch.app.data import Source
    from megabatch.train.evaluate import Mistake

MOST_COLUMNS = 20  # of a matrix that is printed
Counts = Sequence[Sequence[int]]
"""Number of images by label (row) and predicted class (column), [classes, classes]."""


def print_details(console: Console, counts: Counts, names: Sequence[str]) -> None:
    """Prints top-1 by class and, for at most `MOST_COLUMNS` classes, the confusion matrix."""
    console.print(_by_class(counts, names))
    if len(names) <= MOST_COLUMNS:
        console.print()
        console.print(_matrix(counts, names))


def print_mistakes(console: Console, mistakes: "Sequence[Mistake]", source: "Source") -> None:
    """Prints the wrong predictions of the highest probability; nothing if there are none."""
    from megabatch.app.mistakes import image_name

    table = _table("surest mistakes", "label", "predicted", "probability")
    for mistake in mistakes:
        label, predicted = (printable(source.class_names[number]) for number in (mistake.label, mistake.predicted))
        table.add_row(
            Text(image_name(source, mistake.index)), Text(label), Text(predicted), f"{mistake.probability:.4f}"
        )
    if mistakes:
        console.print()
        console.print(table)


def write_matrix(path: Path, counts: Counts, names: Sequence[str]) -> None:
    """Writes the matrix as CSV, with the class names in the first row (predicted) and the first column (label)."""
    with replacing(path) as part, part.open("w", encoding="utf-8", newline="", errors="surrogateescape") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["label", *names])
        table.writerows([name, *row] for name, row in zip(names, counts, strict=True))


def _by_class(counts: Counts, names: Sequence[str]) -> Table:
    table = _table("class", "images", "correct", "top1", "most often taken for")
    for index, (name, row) in enumerate(zip(names, counts, strict=True)):
        num, correct = sum(row), row[index]
        wrong = {other: count for other, count in enumerate(row) if other != index and count}
        most = max(wrong, key=lambda other: wrong[other], default=None)
        mistaken = f"{printable(names[most])} ({wrong[most]:,})" if most is not None else "-"
        top1 = f"{correct / num:.4f}" if num else "-"
        table.add_row(Text(f"{index} {printable(name)}"), f"{num:,}", f"{correct:,}", top1, Text(mistaken))
    return table


def _matrix(counts: Counts, names: Sequence[str]) -> Table:
    table = _table("label / predicted", *map(str, range(len(names))))
    for index, (name, row) in enumerate(zip(names, counts, strict=True)):
        table.add_row(Text(f"{index} {printable(name)}"), *(str(count) if count else "." for count in row))
    return table


def _table(first: str, *headings: str) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(first, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
