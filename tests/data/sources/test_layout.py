"""Training, `check` and `pack` find the same samples, parts and classes in a data set of any layout."""

import io
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from photographs import encode

from megabatch.data.checking.check import check
from megabatch.data.packing.pack import pack
from megabatch.data.sources.dataset import DataSet, open_dataset, open_train_and_evaluation
from megabatch.data.sources.layout import PARTS, find_layout, part_of
from megabatch.data.sources.protocol import EncodedSource
from megabatch.errors import DataError

CLASSES = ("ant", "bee", "cat")
EACH = {"train": 3, "val": 2, "test": 1}  # images of each class


def image(part: str, class_number: int, number: int) -> bytes:
    colour = (PARTS.index(part) * 80, class_number * 60, number * 50)
    return encode(np.full((24, 24, 3), colour, np.uint8), "PNG")


def samples(part: str, classes: tuple[str, ...] = CLASSES) -> list[tuple[str, bytes]]:
    return [(name, image(part, CLASSES.index(name), number)) for name in classes for number in range(EACH[part])]


def write(path: Path, data: bytes = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def folders(root: Path, part: str, classes: tuple[str, ...] = CLASSES) -> None:
    for i, (name, data) in enumerate(samples(part, classes)):
        write(root / name / f"{i}.png", data)


def tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def shard(path: Path, part: str, *, numbers: bool = False) -> None:
    labels = [(str(CLASSES.index(name)) if numbers else name, data) for name, data in samples(part)]
    tar(path, [m for i, (label, data) in enumerate(labels) for m in ((f"{i}.png", data), (f"{i}.cls", label.encode()))])


def in_tar(path: Path, **prefixes: str) -> None:
    tar(
        path,
        [
            (f"{prefix}{name}/{i}.png", data)
            for part, prefix in prefixes.items()
            for i, (name, data) in enumerate(samples(part))
        ],
    )


def parquet(path: Path, part: str) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = samples(part)
    pq.write_table(
        pa.table({"image": [{"bytes": data} for _, data in rows], "label": [name for name, _ in rows]}), path
    )


def three(write_part: Callable[[Path, str], None], *names: str) -> Callable[[Path], None]:
    """Writes train, val and test under these names."""

    def make(root: Path) -> None:
        for part, name in zip(PARTS, names, strict=False):
            write_part(root / name, part)

    return make


def together(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        for step in steps:
            step(root)

    return make


def files(*names: str) -> Callable[[Path], None]:
    """Writes the same image under each name."""
    return together(*(lambda root, name=name: write(root / name, image("test", 0, 0)) for name in names))


def archives_beside(root: Path) -> None:
    three(folders, "train", "val")(root)
    in_tar(root / "ILSVRC2012_img_train.tar", train="train/")
    tar(root / "devkit.tar.gz", [("readme", b"")], "w:gz")
    write(root / "train.parquet", b"not parquet")


def hidden_folders(root: Path) -> None:
    three(folders, "train", "val")(root)
    for place in (".git/ant", "train/.ipynb_checkpoints", "train/ant/.ipynb_checkpoints", "val/bee/__MACOSX/deep"):
        write(root / place / "0-checkpoint.png", image("train", 0, 0))
    write(root / "train/ant/._0.png", b"resource fork")
    write(root / ".cache/train-00000.parquet", b"lock")


def hidden_in_tars(root: Path) -> None:
    for part in ("train", "val"):
        shard(root / f"{part}-0.tar", part)
        with tarfile.open(root / f"{part}-0.tar", "a") as archive:
            for name in ("ant/.ipynb_checkpoints/1.png", "ant/.ipynb_checkpoints/1.cls", "__MACOSX/2.png", "._3.png"):
                info = tarfile.TarInfo(name)
                info.size = 3
                archive.addfile(info, io.BytesIO(b"ant"))
    shard(root / ".trash/train-1.tar", "train")


def numbered_tars(root: Path) -> None:
    for part in ("train", "val"):
        shard(root / f"{part}-0.tar", part, numbers=True)
    write(root / "classes.txt", b"ant\r\nbee\r\ncat\r\n")


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "folders": three(folders, "train", "val"),
    "folders, three parts": three(folders, "train", "val", "test"),
    "folders, other words": three(folders, "training", "valid", "testing"),
    "folders, upper case": three(folders, "Train", "Validation"),
    "folders with prefixes": three(folders, "animals_train", "animals-dev"),
    "folders with a year": three(folders, "train2017", "val2017"),
    "folders and old copies": together(
        three(folders, "train", "val"), lambda root: folders(root / "old_train", "test")
    ),
    "folders and unlabelled images": together(three(folders, "train", "val"), files("test/1.png", "unlabelled/1.png")),
    "folders, archives beside": archives_beside,
    "folders, hidden ones": hidden_folders,
    "tars": three(shard, "train-000000.tar", "val-000000.tar"),
    "tars with prefixes": three(shard, "animals-train-0.tar", "animals-validation-0.tar", "animals-test-0.tar"),
    "tars in folders": three(shard, "train/0.tar", "val/0.tar"),
    "tars in folders of folders": three(shard, "train/00/0.tar", "val/00/0.tar"),
    "tars in folders, others beside": together(
        three(shard, "train/0.tar", "val/0.tar"), lambda root: shard(root / "train-0.tar", "test")
    ),
    "tars further down": three(shard, "data/train/0.tar", "data/val/0.tar"),
    "tars with numbers": numbered_tars,
    "tars, hidden members": hidden_in_tars,
    "tars and a picture": together(three(shard, "train-0.tar", "val-0.tar"), files("docs/logo.png")),
    "one tar of folders": lambda root: in_tar(root / "animals.tar", train="animals/train/", val="animals/val/"),
    "a tar of folders for each part": together(
        lambda root: in_tar(root / "train.tar", train="./"), lambda root: in_tar(root / "val.tar", val="pictures/val/")
    ),
    "parquet": three(parquet, "data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
    "parquet, train and test": three(parquet, "train.parquet", "val.parquet", "test.parquet"),
    "parquet with prefixes": three(parquet, "animals_train.parquet", "animals_eval/0.parquet"),
}


def contents(source: EncodedSource) -> Counter[tuple[str, bytes]]:
    return Counter((source.class_names[source.labels[i]], source.read(i)) for i in range(len(source)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_check_and_pack_see_the_same_samples(layout, tmp_path):
    LAYOUTS[layout](tmp_path / "in")
    opened = open_dataset(tmp_path / "in")
    for name, source in zip(PARTS, opened.parts.values(), strict=False):  # eval/ stands in the place of val
        assert contents(source) == Counter(samples(name)), name
        assert source.class_names == CLASSES
    trained = open_train_and_evaluation(tmp_path / "in").parts
    assert list(trained) == list(opened.parts)[:2]
    report = check(tmp_path / "in")
    assert report.bad == []
    assert report.num_images == sum(map(len, opened.parts.values()))
    packed = pack(tmp_path / "in", tmp_path / "out")
    assert packed.num_samples == {part: len(source) for part, source in opened.parts.items()}
    again = open_dataset(tmp_path / "out")
    for part, source in again.parts.items():
        assert contents(source) == contents(opened.parts[part])


@pytest.mark.parametrize("numbers", [12, 111])
def test_classes_that_are_called_like_numbers_keep_their_images_when_packed(tmp_path, numbers):
    for part in ("train", "val"):
        for i in range(numbers):
            write(tmp_path / "in" / part / str(i) / "1.png", f"{part} {i}".encode())
    pack(tmp_path / "in", tmp_path / "out")
    for part, source in open_dataset(tmp_path / "out").parts.items():
        assert contents(source) == Counter((str(i), f"{part} {i}".encode()) for i in range(numbers))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train", "train"),
        ("Training", "train"),
        ("VAL", "val"),
        ("imagenetVal2012", "val"),
        ("validation-00000-of-00001.parquet", "val"),
        ("dev-set", "val"),
        ("x.test.tar", "test"),
        ("eval", "test"),
        ("latest", None),
        ("trains", None),
        ("device", None),
        ("value", None),
        ("000000.tar", None),
    ],
)
def test_the_part_that_a_name_states(name, part):
    assert part_of(name) == part


# ---- what is left out, noted or refused


def notes(root: Path) -> str:
    return "; ".join(open_train_and_evaluation(root).notes)


def test_what_is_not_read_is_noted(tmp_path):
    archives_beside(tmp_path)
    assert "ILSVRC2012_img_train.tar and 2 more beside the folders is not read" in notes(tmp_path)
    kinds = check(tmp_path).count()
    assert kinds["not read"] == 3


def test_an_archive_beside_folders_is_read_if_it_is_named(tmp_path):
    three(folders, "train", "val")(tmp_path)
    in_tar(tmp_path / "other.tar", train="train/", test="test/")
    opened = open_train_and_evaluation(tmp_path / "other.tar")
    assert {part: len(source) for part, source in opened.parts.items()} == {"train": 9, "test": 3}
    assert opened.notes == ["there is no val; test is the evaluation set"]


def test_a_class_that_val_lacks_is_allowed_and_noted(tmp_path):
    folders(tmp_path / "train", "train")
    folders(tmp_path / "val", "val", ("ant", "cat"))
    for make in (lambda: None, (tmp_path / "val/bee").mkdir):
        make()
        opened = open_train_and_evaluation(tmp_path)
        assert contents(opened.parts["val"]) == Counter(samples("val", ("ant", "cat")))
        assert opened.parts["val"].class_names == CLASSES
        assert opened.notes == ["val has no images of 1 of the 3 classes: 'bee'"]
        report = check(tmp_path)
        assert report.bad == []
        assert report.count()["class in train alone"] == 1
    pack(tmp_path, tmp_path.parent / "out")
    assert open_dataset(tmp_path.parent / "out").parts["val"].class_names == CLASSES


def test_a_class_that_train_lacks_is_refused_by_training_check_and_pack(tmp_path):
    folders(tmp_path / "train", "train", ("ant", "bee"))
    folders(tmp_path / "val", "val")
    for use in (open_train_and_evaluation, lambda path: pack(path, tmp_path.parent / "out")):
        with pytest.raises(DataError, match=r"'cat' is only in val \(2 and 3 classes\)"):
            use(tmp_path)
    assert [problem.kind for problem in check(tmp_path).bad] == ["class not in train"]


def test_names_in_another_order_are_matched_by_name(tmp_path):
    shard(tmp_path / "train/0.tar", "train", numbers=True)
    (tmp_path / "train/classes.txt").write_text("ant\nbee\ncat\n")
    rows = [("0.png", b"c"), ("0.cls", b"0"), ("1.png", b"a"), ("1.cls", b"1")]
    tar(tmp_path / "val/0.tar", rows)
    (tmp_path / "val/classes.txt").write_text("cat\nant\n")
    assert contents(open_dataset(tmp_path).parts["val"]) == Counter([("cat", b"c"), ("ant", b"a")])


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda root: write(root / "readme.txt"), "contains no images; needed: train/CLASS"),
    "two words for a part": (
        three(folders, "train", "val", "validation"),
        r"holds val/ and validation/, which both mean 'val'; keep one",
    ),
    "two words for files": (
        three(shard, "train-0.tar", "val-0.tar", "valid-0.tar"),
        "holds images for 'val' as 'val' and 'valid'",
    ),
    "two data sets in one folder": (
        together(three(shard, "a/train-0.tar", "a/val-0.tar"), three(shard, "b/train-0.tar", "b/val-0.tar")),
        "holds images for 'train' as a/ and b/, maybe two data sets; name or keep one",
    ),
    "a part beside folders of images": (
        together(three(folders, "train"), files("more/1.png")),
        "train may be a part or a class",
    ),
    "one folder above": (
        three(folders, "set/train", "set/val"),
        r"has no folder train/, but .*set has; did you mean",
    ),
    "parts inside of classes": (
        files(*(f"{name}/{part}/1.png" for name in CLASSES for part in ("train", "val"))),
        "needed: train/ant instead of ant/train",
    ),
    "parts without classes": (
        files("train/1.png", "val/1.png"),
        "one folder of image files per class",
    ),
    "tars and parquet": (
        together(three(shard, "train.tar"), files("train.parquet")),
        "both tar and parquet files; name one of them",
    ),
    "a part beside folders in a tar": (
        lambda root: in_tar(root / "x.tar", train="train/", val="more/"),
        "it may be a part or a class",
    ),
}


def refused_by_check(path: Path) -> bool:
    try:
        return bool(check(path).bad)
    except DataError:
        return True


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_unclear_is_refused_by_all(case, tmp_path):
    make, message = REFUSED[case]
    make(tmp_path / "in")
    for use in (open_dataset, open_train_and_evaluation, lambda path: pack(path, tmp_path / "out")):
        with pytest.raises(DataError, match=message):
            use(tmp_path / "in")
    assert refused_by_check(tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_training_needs_two_parts_and_two_classes(tmp_path):
    folders(tmp_path / "train", "train")
    with pytest.raises(DataError, match=r"no images for 'val', only for train; needed: val/CLASS/1\.jpg"):
        open_train_and_evaluation(tmp_path)
    shutil.rmtree(tmp_path / "train")
    for part in ("train", "val"):
        folders(tmp_path / part / "images", part)
    with pytest.raises(DataError, match=r"has one class, 'images'; at least 2 .* directly below train/"):
        open_train_and_evaluation(tmp_path)


def test_a_folder_of_classes_is_one_part(tmp_path):
    folders(tmp_path, "train")
    opened: DataSet = open_dataset(tmp_path)
    assert list(opened.parts) == ["train"]
    assert contents(opened.parts["train"]) == Counter(samples("train"))


def test_a_class_may_be_called_like_a_part(tmp_path):
    for name in ("train", "bus", "test_tube"):
        write(tmp_path / name / "1.png", name.encode())
    assert open_dataset(tmp_path).parts["train"].class_names == ("bus", "test_tube", "train")


def test_parts_may_be_links_to_another_disk(tmp_path):
    three(shard, "disk/train/0.tar", "disk/val/0.tar")(tmp_path)
    (tmp_path / "set").mkdir()
    for part in ("train", "val"):
        (tmp_path / "set" / part).symlink_to(tmp_path / "disk" / part)
    assert [len(source) for source in open_dataset(tmp_path / "set").parts.values()] == [9, 6]
    assert find_layout(tmp_path / "set").kind == "tars"
