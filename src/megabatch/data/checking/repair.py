"""Repairs or moves away the files that `check` reports in a folder of images. Never deletes a file."""

import io
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps

from megabatch.data.checking.check import KEPT_ENDING, CheckReport, Problem
from megabatch.data.jpeg.decode import PILLOW_ERRORS, decode
from megabatch.data.jpeg.ends import image_end
from megabatch.data.jpeg.formats import ENDINGS, preferred_ending, sniff
from megabatch.errors import DataError

_FINE_JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}


@dataclass(frozen=True)
class RepairReport:
    """Repaired or moved problems with the file's new path, and the problems that remain."""

    done: list[tuple[Problem, Path]] = field(default_factory=list)
    remaining: list[Problem] = field(default_factory=list)

    @property
    def bad(self) -> list[Problem]:
        """Remaining problems that make training refuse or replace a file."""
        return [problem for problem in self.remaining if problem.is_bad]


def _to_rgb(data: bytes) -> bytes:
    """Re-encodes the image as training decodes it: first frame, 8 bits, RGB; JPEG stays JPEG, others become PNG."""
    return _encoded(Image.fromarray(decode(data)), is_jpeg=sniff(data) == "jpeg")


def upright(data: bytes) -> bytes:
    """Applies the EXIF orientation to the pixels; files without one, and damaged ones, are returned unchanged."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
                return _encoded(ImageOps.exif_transpose(image).convert("RGB"), is_jpeg=image.format == "JPEG")
    except PILLOW_ERRORS:
        pass
    return data


def _encoded(image: Image.Image, *, is_jpeg: bool) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if is_jpeg else "PNG", **(_FINE_JPEG if is_jpeg else {}))
    return buffer.getvalue()


REPAIRS: dict[str, Callable[[bytes], bytes]] = {
    "missing end": lambda data: data + b"\xff\xd9",
    "trailing bytes": lambda data: data[: image_end(data)],
    "stray bytes": _to_rgb,
    "CMYK": _to_rgb,
    "16 bit": _to_rgb,
    "animated": _to_rgb,
    "wrong ending": lambda data: data,
    "rotated": upright,
}
DEFAULT_REPAIRS = frozenset(REPAIRS) - {"rotated"}  # optional: the labels may have been made without it


def repair(
    report: CheckReport, *, into: Path | str | None = None, kinds: Collection[str] = DEFAULT_REPAIRS
) -> RepairReport:
    """Rewrites files that have problems of these kinds, with a file name ending that matches the format.

    Without `into`, files are repaired in place, and the original is kept beside the new file as `NAME.orig`, which
    training ignores. With `into`, new files are written there, in the same subfolders, and the data set is unchanged.

    Raises:
        DataError: the data set is not a folder of images, or a kind cannot be repaired.
    """
    unknown = sorted(set(kinds) - set(REPAIRS))
    if unknown:
        raise DataError(f"'{unknown[0]}' cannot be repaired; kinds that can: {', '.join(sorted(REPAIRS))}")
    root = _folder(report)
    target = root if into is None else Path(into).expanduser()
    unrepairable = {problem.name for problem in report.bad if problem.kind not in REPAIRS}
    to_repair: dict[str, list[Problem]] = {}
    for problem in report.problems:
        if problem.kind in kinds and problem.name not in unrepairable:
            to_repair.setdefault(problem.name, []).append(problem)
    done: list[tuple[Problem, Path]] = []
    for name, found in to_repair.items():
        path = _rewrite(root, name, found, target)
        done += [(problem, path) for problem in found]
    return RepairReport(done, _remaining(report, done))


def exclude(
    report: CheckReport, *, into: Path | str | None = None, kinds: Collection[str] | None = None
) -> RepairReport:
    """Moves files with problems of these kinds out of the data set; by default bad files and empty classes.

    They are moved to `into`, in the same subfolders; the default is a folder `NAME.excluded` beside the data set.

    Raises:
        DataError: the data set is not a folder of images.
    """
    root = _folder(report)
    target = Path(into).expanduser() if into is not None else root.with_name(root.name + ".excluded")
    moved: dict[str, Path] = {}
    for problem in report.problems:
        if not _should_exclude(problem, kinds) or not os.path.lexists(root / problem.name):
            continue
        moved[problem.name] = _unused_path(target / problem.name)
        moved[problem.name].parent.mkdir(parents=True, exist_ok=True)
        shutil.move(root / problem.name, moved[problem.name])
    done = [(problem, moved[problem.name]) for problem in report.problems if problem.name in moved]
    return RepairReport(done, _remaining(report, done))


def _should_exclude(problem: Problem, kinds: Collection[str] | None) -> bool:
    if kinds is not None:
        return problem.kind in kinds
    return (
        problem.is_bad and problem.kind != "class not in train"
    )  # the images are good: moving them needs an explicit request


def _folder(report: CheckReport) -> Path:
    if not report.is_folder:
        raise DataError(
            f"{report.path} is not a folder of plain image files; pack its images again from their source, "
            "or skip bad ones with `megabatch data pack --skip-bad`"
        )
    return report.path


def _rewrite(root: Path, name: str, problems: list[Problem], target: Path) -> Path:
    """Writes the repaired file and returns its path. The new file is complete before the old one is renamed."""
    data = (root / name).read_bytes()
    for kind, change in REPAIRS.items():  # in the table's order: byte repairs first, re-encoding after
        if any(problem.kind == kind for problem in problems):
            data = change(data)
    path = target / _matching_name(name, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unused_path(path.with_name(f".{path.name}.part"))
    unfinished.write_bytes(data)
    if target == root:
        (root / name).rename(_unused_path(root / (name + KEPT_ENDING)))
    path = _unused_path(path)
    unfinished.rename(path)
    return path


def _matching_name(name: str, data: bytes) -> str:
    kind = sniff(data)
    if kind is None or Path(name).suffix.lower().removeprefix(".") in ENDINGS[kind]:
        return name
    return str(Path(name).with_suffix(f".{preferred_ending(data)}"))


def _unused_path(path: Path) -> Path:
    """Returns the path itself if it does not exist, else the first free one of the form `NAME-2`, `NAME-3`, ..."""
    candidate, number = path, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _remaining(report: CheckReport, done: list[tuple[Problem, Path]]) -> list[Problem]:
    gone = {problem for problem, _ in done}
    return [problem for problem in report.problems if problem not in gone]
