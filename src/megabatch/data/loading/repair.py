"""Put right or set aside what `check` found in a folder of images. Nothing is ever deleted."""

import io
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from megabatch.data.checking.check import KEPT_ENDING, CheckReport, Problem
from megabatch.data.checking.check_file import jpeg_end
from megabatch.data.jpeg.decode import decode
from megabatch.data.jpeg.formats import ENDINGS, preferred_ending, sniff
from megabatch.errors import DataError

_FINE_JPEG: dict[str, Any] = {"quality": 95, "subsampling": 0}


@dataclass(frozen=True)
class RepairReport:
    """What was done: (problem, where the file is now), and what remains."""

    done: list[tuple[Problem, Path]] = field(default_factory=list)
    remaining: list[Problem] = field(default_factory=list)

    @property
    def bad(self) -> list[Problem]:
        """What training still refuses or replaces."""
        return [problem for problem in self.remaining if problem.is_bad]


def _to_rgb(data: bytes) -> bytes:
    """As training sees it: the first frame, 8 bits, RGB; JPEG stays JPEG, everything else becomes PNG."""
    return _encoded(Image.fromarray(decode(data)), is_jpeg=sniff(data) == "jpeg")


def _upright(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        return _encoded(ImageOps.exif_transpose(image).convert("RGB"), is_jpeg=image.format == "JPEG")


def _encoded(image: Image.Image, *, is_jpeg: bool) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if is_jpeg else "PNG", **(_FINE_JPEG if is_jpeg else {}))
    return buffer.getvalue()


REPAIRS: dict[str, Callable[[bytes], bytes]] = {
    "missing end": lambda data: data + b"\xff\xd9",
    "trailing bytes": lambda data: data[: jpeg_end(data)],
    "stray bytes": _to_rgb,
    "CMYK": _to_rgb,
    "16 bit": _to_rgb,
    "animated": _to_rgb,
    "wrong ending": lambda data: data,
    "rotated": _upright,
}
DEFAULT_REPAIRS = frozenset(REPAIRS) - {"rotated"}  # to turn images is a choice: their labels were made unturned


def repair(
    report: CheckReport, *, into: Path | str | None = None, kinds: Collection[str] = DEFAULT_REPAIRS
) -> RepairReport:
    """Write files anew without the problems of these kinds, under an ending that fits.

    In place, the file as it was stays beside the new one as `NAME.orig`, which training passes over. With `into`, the
    new files go there, under the same folders, and the data set is not touched.

    Raises:
        DataError: the data set is not a folder of images, or a kind that cannot be repaired.
    """
    unknown = sorted(set(kinds) - set(REPAIRS))
    if unknown:
        raise DataError(f"'{unknown[0]}' cannot be repaired; what can: {', '.join(sorted(REPAIRS))}")
    root = _folder(report)
    target = root if into is None else Path(into).expanduser()
    hopeless = {problem.name for problem in report.bad if problem.kind not in REPAIRS}
    wanted: dict[str, list[Problem]] = {}
    for problem in report.problems:
        if problem.kind in kinds and problem.name not in hopeless:
            wanted.setdefault(problem.name, []).append(problem)
    done: list[tuple[Problem, Path]] = []
    for name, found in wanted.items():
        path = _rewrite(root, name, found, target)
        done += [(problem, path) for problem in found]
    return RepairReport(done, _without(report, done))


def exclude(
    report: CheckReport, *, into: Path | str | None = None, kinds: Collection[str] | None = None
) -> RepairReport:
    """Move what has problems of these kinds out of the data set: by default every bad file, and empty classes.

    They go to `into`, by default a folder beside the data set called `NAME.excluded`, under the same folders.

    Raises:
        DataError: the data set is not a folder of images.
    """
    root = _folder(report)
    target = Path(into).expanduser() if into is not None else root.with_name(root.name + ".excluded")
    moved: dict[str, Path] = {}
    for problem in report.problems:
        if not _to_be_excluded(problem, kinds) or not os.path.lexists(root / problem.name):
            continue
        moved[problem.name] = _free(target / problem.name)
        moved[problem.name].parent.mkdir(parents=True, exist_ok=True)
        shutil.move(root / problem.name, moved[problem.name])
    done = [(problem, moved[problem.name]) for problem in report.problems if problem.name in moved]
    return RepairReport(done, _without(report, done))


def _to_be_excluded(problem: Problem, kinds: Collection[str] | None) -> bool:
    if kinds is not None:
        return problem.kind in kinds
    return problem.is_bad and problem.kind != "class in one part"  # its images are good: for a person to decide


def _folder(report: CheckReport) -> Path:
    if not report.is_folder:
        raise DataError(
            f"{report.path} is not a folder of plain image files; pack its images again from their source, "
            "or leave bad ones out with `megabatch data pack --skip-bad`"
        )
    return report.path


def _rewrite(root: Path, name: str, problems: list[Problem], target: Path) -> Path:
    """The new file of one name. It is whole before the old one moves."""
    data = (root / name).read_bytes()
    for kind, change in REPAIRS.items():  # in their order: the bytes first, the colours after
        if any(problem.kind == kind for problem in problems):
            data = change(data)
    path = target / _name_that_fits(name, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _free(path.with_name(f".{path.name}.part"))
    unfinished.write_bytes(data)
    if target == root:
        (root / name).rename(_free(root / (name + KEPT_ENDING)))
    path = _free(path)
    unfinished.rename(path)
    return path


def _name_that_fits(name: str, data: bytes) -> str:
    kind = sniff(data)
    if kind is None or Path(name).suffix.lower().removeprefix(".") in ENDINGS[kind]:
        return name
    return str(Path(name).with_suffix(f".{preferred_ending(data)}"))


def _free(path: Path) -> Path:
    """The path, or the next one like it under which there is nothing yet."""
    candidate, number = path, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _without(report: CheckReport, done: list[tuple[Problem, Path]]) -> list[Problem]:
    gone = {problem for problem, _ in done}
    return [problem for problem in report.problems if problem not in gone]
