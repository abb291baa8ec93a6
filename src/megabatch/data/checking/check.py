"""Checks a whole data set: finds files that training cannot use, and unusual ones."""

import hashlib
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megabatch.cores import usable_cores
from megabatch.data.checking.check_file import BAD_KINDS, Finding, inspect_image
from megabatch.data.jpeg.decode import MAX_PIXELS
from megabatch.data.loading.prefetch import in_order
from megabatch.data.sources.dataset import open_dataset
from megabatch.data.sources.labels import agree_on_classes
from megabatch.data.sources.layout import IMAGE_SUFFIXES, METADATA_NAMES, Layout, find_layout, is_hidden
from megabatch.data.sources.metadata import open_metadata
from megabatch.data.sources.parquet import ParquetSource
from megabatch.data.sources.protocol import EncodedSource
from megabatch.data.sources.python_dataset import PythonSource, open_python
from megabatch.data.sources.tar.shards import ShardSource
from megabatch.data.sources.tar.tar_folder import holds_labels, open_folders_in_tar
from megabatch.errors import DataError
from megabatch.user_code import is_function, short_name

OnProgress = Callable[[int, int], None]
"""Receives the number of images checked and the total."""

KEPT_ENDING = ".orig"  # extension under which `repair` keeps the original of a file that it changed


@dataclass(frozen=True)
class Problem:
    """One problem of one file.

    `name` is the file's path within the data set, or shard:member, or a class folder; `kind` is one of `KINDS`.
    """

    name: str
    kind: str
    detail: str

    @property
    def is_bad(self) -> bool:
        """True if training rejects the data set or replaces the sample because of this problem."""
        return self.kind in BAD_KINDS


@dataclass(frozen=True)
class CheckReport:
    """All problems of a data set, sorted by name."""

    path: Path
    num_images: int
    problems: list[Problem] = field(default_factory=list)
    is_folder: bool = True  # plain files, not tars or parquet

    @property
    def bad(self) -> list[Problem]:
        """Problems for which training rejects the data set or replaces the sample."""
        return [problem for problem in self.problems if problem.is_bad]

    def count(self) -> Counter[str]:
        """Number of problems of each kind."""
        return Counter(problem.kind for problem in self.problems)


def check(
    path: Path | str,
    *,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
) -> CheckReport:
    """Reads and decodes every image of a data set of any kind; reports all bad and odd ones.

    The data set is found as for training; FILE.py:FUNCTION runs the file. No file is changed; `repair` and `exclude` do
    that. Decoding uses `workers` threads (default: one per core) and under 1 kB per image.

    Raises:
        DataError: there is no data set at `path`, or it is unclear which files are meant.
    """
    problems: list[Problem] = []
    if is_function(path):
        path, is_folder = Path(path), False
        images = _list_python(str(path), problems)
    else:
        layout = find_layout(path)
        path, is_folder = layout.path, layout.kind == "folders"
        problems += [Problem(_below(left, path), "not read", f"beside the {layout.kind}") for left in layout.left_out]
        images = (_list_folder if is_folder else _list_archives)(layout, problems)
        problems += _class_in_one_part(images)
        if not any(problem.is_bad for problem in problems):
            problems += _of_the_whole(path)
    duplicates = _Duplicates()
    with warnings.catch_warnings(), ThreadPoolExecutor(workers or usable_cores()) as threads:
        warnings.simplefilter("ignore")  # Pillow warns about files that are reported here anyway
        found = in_order(partial(_inspect, max_pixels=max_pixels), images, executor=threads, depth=64)
        for done, (image, (findings, digest)) in enumerate(zip(images, found, strict=True), start=1):
            problems += [Problem(image.name, kind, detail) for kind, detail in findings]
            problems += duplicates.add(image, digest)
            if on_progress is not None:
                on_progress(done, len(images))
    problems.sort(key=lambda problem: (problem.name, problem.kind))
    return CheckReport(path, len(images), problems, is_folder=is_folder)


@dataclass(frozen=True, slots=True)
class _Image:
    """An image to check: its name, part and class, and a function that reads it."""

    name: str
    part: str
    class_name: str
    read: Callable[[], bytes]
    has_ending: bool = True


def _inspect(image: _Image, *, max_pixels: int) -> tuple[list[Finding], bytes | None]:
    """Findings about an image and a checksum of its bytes (None if it is empty or unreadable)."""
    try:
        data = image.read()
    except (OSError, DataError) as error:
        return [("unreadable", str(error))], None
    ending = image.name.rsplit(".", 1)[-1] if image.has_ending else None
    findings = inspect_image(data, ending, max_pixels=max_pixels)
    return findings, hashlib.sha256(data).digest()[:16] if data else None


class _Duplicates:
    """Detects files with equal bytes; each is reported with reference to the first of them."""

    def __init__(self) -> None:
        self._first: dict[bytes, _Image] = {}

    def add(self, image: _Image, digest: bytes | None) -> Iterator[Problem]:
        if digest is None:
            return
        first = self._first.setdefault(digest, image)
        if first is image:
            return
        if first.part != image.part:
            yield Problem(image.name, "train in val", f"the same bytes as {first.name}")
        if first.class_name != image.class_name:
            yield Problem(image.name, "two classes", f"the same bytes as {first.name}")
        elif first.part == image.part:
            yield Problem(image.name, "duplicate", f"the same bytes as {first.name}")


def _of_the_whole(path: Path) -> list[Problem]:
    """What training refuses and no single file shows, such as labels that are identifiers."""
    try:
        open_dataset(path)
    except DataError as error:
        return [Problem(path.name, "refused data set", str(error))]
    return []


def _list_python(text: str, problems: list[Problem]) -> list[_Image]:
    """Images of a user's function; appends what training refuses to `problems`."""
    parts = open_python(text)
    images = [image for part, source in parts.items() for image in _list_source(source, text, part)]
    problems += _class_in_one_part(images)
    try:
        agree_on_classes(parts, text, numbered=all(source.numbered for source in parts.values()))
    except DataError as error:
        problems.append(Problem(short_name(text), "refused data set", str(error)))
    return images


def _list_folder(layout: Layout, problems: list[Problem]) -> list[_Image]:
    """Images of the folders of parts, or of one folder of classes; appends to `problems`."""
    folders = {part: paths[0] for part, paths in layout.parts.items()}
    if folders.get("train") == layout.path:
        return _list_classes(layout.path, layout.path, "", problems)
    problems += _stray_files(layout.path, layout.path, keep=[folder.name for folder in folders.values()])
    return [image for part, folder in folders.items() for image in _list_classes(layout.path, folder, part, problems)]


def _list_archives(layout: Layout, problems: list[Problem]) -> list[_Image]:
    """Images of tar and parquet files; an archive that cannot be opened is appended to `problems`."""
    images: list[_Image] = []
    for part, file in [(part, file) for part, files in layout.parts.items() for file in files]:
        name = _below(file, layout.path) if file != layout.path else file.name
        try:
            sources = _open_archive(file, part)
        except DataError as error:
            problems.append(Problem(name, "refused archive", str(error)))
            continue
        for inner, source in sources.items():
            images += _list_source(source, name, inner)
    return images


def _open_archive(file: Path, part: str) -> dict[str, EncodedSource]:
    """The sources in one file by part."""
    if file.suffix in {".csv", ".jsonl"} or file.name in METADATA_NAMES:
        found = open_metadata(file)
        return {**found} if len(found) > 1 else dict(zip([part], found.values(), strict=True))
    if file.suffix == ".parquet":
        return {part: ParquetSource(file)}
    return {part: ShardSource(file)} if holds_labels(file) else {**open_folders_in_tar(file)}


def _list_source(source: EncodedSource, file: str, part: str) -> Iterator[_Image]:
    members = source.member_names() if isinstance(source, ShardSource) else map(source.name, range(len(source)))
    for i, member in enumerate(members):
        label = f"{file}:{member}" if isinstance(source, ShardSource) else member
        class_name = source.class_names[source.labels[i]]
        is_row = isinstance(source, ParquetSource | PythonSource)
        yield _Image(label, part, class_name, partial(source.read, i), has_ending=not is_row)


def _list_classes(root: Path, folder: Path, part: str, problems: list[Problem]) -> list[_Image]:
    """Images in the class folders of one part."""
    problems += _stray_files(root, folder, keep=[entry.name for entry in os.scandir(folder) if entry.is_dir()])
    images: list[_Image] = []
    for class_folder in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        name = _below(class_folder, root)
        if is_hidden(class_folder.name):
            problems.append(Problem(name, "hidden", "a hidden folder"))
        elif link := _link_problem(class_folder, root, folder):
            problems.append(link)
        else:
            paths = list(_walk(root, folder, class_folder, problems))
            images += [_Image(_below(path, root), part, class_folder.name, path.read_bytes) for path in paths]
            if not paths and part in {"train", ""}:
                problems.append(Problem(name, "empty class", "no images in it"))
    return images


def _walk(root: Path, folder: Path, class_folder: Path, problems: list[Problem]) -> Iterator[Path]:
    """Files whose names are those of images; all others are appended to `problems`."""

    def unreadable(error: OSError) -> None:
        problems.append(Problem(_below(Path(error.filename), root), "unreadable", str(error.strerror)))

    for parent, folders, files in os.walk(class_folder, onerror=unreadable):
        hidden = [name for name in sorted(folders) if is_hidden(name)]
        problems += [Problem(_below(Path(parent, name), root), "hidden", "a hidden folder") for name in hidden]
        folders[:] = sorted(set(folders) - set(hidden))
        problems += filter(None, (_link_problem(Path(parent, name), root, folder) for name in folders))
        problems += _case_clashes(root, parent, files)
        for file in sorted(files):
            path = Path(parent, file)
            problem = _problem_of_name(path, root, folder)
            problems += _odd_name(path, root)
            if problem is None:
                yield path
            elif path.suffix != KEPT_ENDING:
                problems.append(problem)


def _problem_of_name(path: Path, root: Path, folder: Path) -> Problem | None:
    """Reason why a file is not read as an image, judged by its name and file type only, or None."""
    name = _below(path, root)
    if link := _link_problem(path, root, folder):
        return link
    if path.name.startswith("."):
        return Problem(name, "hidden", "begins with a dot")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return Problem(name, "unknown ending", f"'{path.suffix}'" if path.suffix else "no ending")
    if not stat.S_ISREG(path.stat().st_mode):
        return Problem(name, "special file", "not a plain file")
    return None


def _link_problem(path: Path, root: Path, folder: Path) -> Problem | None:
    """A symbolic link may point anywhere within its part, `folder`, which may itself be a link to another disk."""
    if not path.is_symlink():
        return None
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(folder)):
        return Problem(_below(path, root), "link out", f"points to {target}")
    return None if target.exists() else Problem(_below(path, root), "broken link", f"points to {target}")


def _odd_name(path: Path, root: Path) -> Iterator[Problem]:
    if not path.name.isprintable():
        yield Problem(_below(path, root), "odd name", f"the name is {path.name!a}")


def _case_clashes(root: Path, parent: str, files: Sequence[str]) -> Iterator[Problem]:
    count = Counter(file.casefold() for file in files)
    for file in sorted(files):
        if count[file.casefold()] > 1:
            yield Problem(_below(Path(parent, file), root), "case clash", "another name differs only in case")


def _stray_files(root: Path, folder: Path, keep: Sequence[str]) -> Iterator[Problem]:
    """Files next to the class folders, or next to train and val."""
    for path in sorted(folder.iterdir()):
        if path.name in keep:
            continue
        if link := _link_problem(path, root, folder):
            yield link
        elif path.name.startswith("."):
            yield Problem(_below(path, root), "hidden", "begins with a dot")
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            yield Problem(_below(path, root), "no class", f"is in {folder.name}, not in a class folder")


def _class_in_one_part(images: Sequence[_Image]) -> Iterator[Problem]:
    """Classes that val or test has and train lacks, which is refused, or the other way round, which is allowed."""
    classes: dict[str, set[str]] = {}
    for image in images:
        classes.setdefault(image.part, set()).add(image.class_name)
    if "train" not in classes:
        return
    train = classes.pop("train")
    for part, names in classes.items():
        for name in sorted(names - train):
            yield Problem(f"{part}/{name}", "class not in train", "train has no images of this class")
        for name in sorted(train - names):
            yield Problem(f"train/{name}", "class in train alone", f"{part} has no images of this class")


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
