"""Tables that list image files with their labels, in Hugging Face's ImageFolder layout."""

import json
import shutil
from pathlib import Path

import pytest

from megabatch.data.checking.check import check
from megabatch.data.packing.pack import pack
from megabatch.data.sources.dataset import open_dataset, open_train_and_evaluation
from megabatch.data.sources.layout import find_layout
from megabatch.errors import DataError

PHOTOS = Path(__file__).parents[1] / "photos"
FILES = sorted(PHOTOS.glob("train/*/*.jpg"))[:6]
KINDS = [file.parent.name for file in FILES]


def write_csv(path, rows, header="file_name,label"):
    path.write_text("\n".join([header, *(f"{name},{label}" for name, label in rows)]) + "\n")


@pytest.fixture
def flat(tmp_path):
    """train/ and val/ with images 0.jpg, 1.jpg, ... and a table each."""
    for part, count in (("train", 6), ("val", 4)):
        folder = tmp_path / "flat" / part
        folder.mkdir(parents=True)
        for number in range(count):
            shutil.copy(FILES[number], folder / f"{number}.jpg")
        write_csv(folder / "metadata.csv", [(f"{number}.jpg", f"kind{number % 2}") for number in range(count)])
    return tmp_path / "flat"


def test_a_table_in_each_part_gives_the_labels(flat):
    train, val = open_train_and_evaluation(flat).parts.values()
    assert train.class_names == val.class_names == ("kind0", "kind1")
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert val.read(3) == FILES[3].read_bytes()
    assert train.name(2).endswith("train/2.jpg")


def test_one_table_beside_the_folders_of_parts_is_divided_by_them(flat):
    for part in ("train", "val"):
        (flat / part / "metadata.csv").unlink()
    rows = [
        {"file_name": f"{part}/{number}.jpg", "label": number % 3} for part in ("train", "val") for number in range(4)
    ]
    (flat / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = open_dataset(flat).parts
    assert {part: source.labels.tolist() for part, source in parts.items()} == {
        "train": [0, 1, 2, 0],
        "val": [0, 1, 2, 0],
    }


def test_a_parquet_table_is_read_like_a_csv(flat):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for part, count in (("train", 6), ("val", 4)):
        (flat / part / "metadata.csv").unlink()
        columns = {"file_name": [f"{i}.jpg" for i in range(count)], "category": [f"k{i % 2}" for i in range(count)]}
        parquet.write_table(pyarrow.table(columns), flat / part / "metadata.parquet")
    train, val = open_train_and_evaluation(flat).parts.values()
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert val.class_names == ("k0", "k1")


def test_class_folders_come_before_a_table_beside_them(tmp_path):
    shutil.copytree(PHOTOS, tmp_path / "photos")
    write_csv(tmp_path / "photos" / "metadata.csv", [("train/x.jpg", 1)])
    assert find_layout(tmp_path / "photos").kind == "folders"


def test_check_and_pack_see_the_same_samples(flat, tmp_path):
    report = check(flat)
    assert report.num_images == 10
    assert not any(problem.is_bad for problem in report.problems)
    pack(flat, tmp_path / "shards")
    train = open_dataset(tmp_path / "shards").parts["train"]
    assert sorted(train.labels.tolist()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file_name,width,height\n0.jpg,3,4\n", "needed: file_name and label"),
        ("file_name,label\n", "lists no images"),
        ("file_name,label\n0.jpg,\n", "label is ''"),
        ("file_name,label\n../../secret.jpg,1\n", "out of the data set"),
        ("file_name,label\n/etc/passwd,1\n", "out of the data set"),
        ("file_name,label\n0.jpg\n", "row 0 has no file_name or no label"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(flat, text, said):
    (flat / "train" / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match=said):
        open_train_and_evaluation(flat)


@pytest.mark.parametrize("text", ["no json", "[" * 100_000])
def test_rows_that_are_no_json_are_refused(flat, text):
    (flat / "train" / "metadata.csv").unlink()
    (flat / "train" / "metadata.jsonl").write_text(text)
    with pytest.raises(DataError, match="cannot be read as a table"):
        open_train_and_evaluation(flat)
