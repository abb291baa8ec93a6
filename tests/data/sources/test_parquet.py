"""Parquet files in Hugging Face's layout."""

import builtins
import json
import threading
from pathlib import Path

import numpy as np
import pytest

from megabatch.data.sources.protocol import EncodedSource
from megabatch.errors import DataError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

from megabatch.data.sources.dataset import open_parquet  # noqa: E402
from megabatch.data.sources.parquet import ParquetSource  # noqa: E402


def image(i: int) -> bytes:
    return b"image %d" % i * (1 + i % 5)


def write(path: Path, rows: range, *, names: list[str] | None = None, group: int = 4, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {
        "image": [{"bytes": image(i), "path": f"{i}.jpg"} for i in rows],
        "label": [i % 3 for i in rows],
        **columns,
    }
    schema = pa.table(table)
    if names is not None:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        schema = schema.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(schema, path, row_group_size=group)
    return path


def test_every_row_comes_back_in_any_order_through_a_cache_of_one_row_group(tmp_path):
    write(tmp_path / "a.parquet", range(10))
    write(tmp_path / "b.parquet", range(10, 17))
    source = ParquetSource(tmp_path, cache_bytes=1)
    assert isinstance(source, EncodedSource)
    assert len(source) == 17
    assert list(source.shard_sizes) == [4, 4, 2, 4, 3]
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [i % 3 for i in range(17)]
    assert source.class_names == ("0", "1", "2")
    assert [source.read(int(i)) for i in np.arange(17)[::-1]] == [image(i) for i in range(17)][::-1]
    assert source.name(11) == "b.parquet:1"
    with pytest.raises(IndexError):
        source.read(17)


def test_an_epoch_in_row_group_order_reads_each_row_group_once(tmp_path, monkeypatch):
    source = ParquetSource(write(tmp_path / "a.parquet", range(20)), cache_bytes=1)
    loads = []
    original = source._cache._load
    monkeypatch.setattr(source._cache, "_load", lambda number: loads.append(number) or original(number))
    for i in range(20):
        source.read(i)
    assert loads == [0, 1, 2, 3, 4]


def test_class_names_come_from_the_schema(tmp_path):
    source = ParquetSource(write(tmp_path / "a.parquet", range(5), names=["cat", "dog", "wolf", "yak"]))
    assert source.class_names == ("cat", "dog", "wolf", "yak")


def test_labels_may_be_strings_and_images_plain_binary(tmp_path):
    pq.write_table(pa.table({"label": ["wolf", "cat"], "img": [b"w", b"c"]}), tmp_path / "a.parquet")
    source = ParquetSource(tmp_path / "a.parquet")
    assert source.class_names == ("cat", "wolf")
    assert source.labels.tolist() == [1, 0]
    assert source.read(0) == b"w"


def test_threads_share_the_row_groups(tmp_path):
    source = ParquetSource(write(tmp_path / "a.parquet", range(40)), cache_bytes=30)
    wrong = []

    def work(seed: int) -> None:
        wrong.extend(i for i in np.random.default_rng(seed).integers(0, 40, 60) if source.read(int(i)) != image(i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("data/train.parquet", "data/test.parquet"),
        ("train/0.parquet", "val/0.parquet"),
    ],
)
def test_train_and_validation_are_found_by_their_names(tmp_path, train, val):
    write(tmp_path / train, range(9))
    write(tmp_path / val, range(6))
    sources = open_parquet(tmp_path)
    assert [len(source) for source in sources] == [9, 6]


def test_a_missing_part_and_different_classes_are_refused(tmp_path):
    write(tmp_path / "train.parquet", range(9))
    with pytest.raises(DataError, match="no images for 'val', only for train"):
        open_parquet(tmp_path)
    write(tmp_path / "val.parquet", range(6), names=["cat", "dog", "wolf"])
    with pytest.raises(DataError, match="classes of train and val differ"):
        open_parquet(tmp_path)


def test_the_highest_numeric_label_of_train_and_val_gives_the_number_of_classes(tmp_path):
    write(tmp_path / "train.parquet", range(9))
    write(tmp_path / "val.parquet", range(2))
    train, val = open_parquet(tmp_path)
    assert train.class_names == val.class_names == ("0", "1", "2")


def test_files_without_the_columns_or_with_empty_cells_are_refused(tmp_path):
    pq.write_table(pa.table({"label": [1], "text": ["a"]}), tmp_path / "no-image.parquet")
    with pytest.raises(DataError, match=r"no column of image bytes among label, text"):
        ParquetSource(tmp_path / "no-image.parquet")
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "no-label.parquet")
    with pytest.raises(DataError, match="no column of labels"):
        ParquetSource(tmp_path / "no-label.parquet")
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": [0, None]}), tmp_path / "hole.parquet")
    with pytest.raises(DataError, match="row 1 has no label"):
        ParquetSource(tmp_path / "hole.parquet")
    pq.write_table(pa.table({"image": [b"x"], "label": [-1]}), tmp_path / "negative.parquet")
    with pytest.raises(DataError, match="label -1"):
        ParquetSource(tmp_path / "negative.parquet")
    rows = [{"bytes": None, "path": "/etc/passwd"}]
    pq.write_table(
        pa.table({"image": pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), "label": [0]}),
        tmp_path / "path.parquet",
    )
    with pytest.raises(DataError, match="no image bytes; paths of other files are not followed"):
        ParquetSource(tmp_path / "path.parquet").read(0)


DIFFERENT = {
    "columns": (
        {"image": [b"x"], "label": [0]},
        {"img": [b"x"], "label": [0]},
        "columns img, label, but a.parquet has",
    ),
    "labels": ({"image": [b"x"], "label": [0]}, {"image": [b"x"], "label": ["cat"]}, "labels of type text"),
    "label columns": (
        {"image": [b"x"], "label": [0], "fine_label": [3]},
        {"image": [b"x"], "fine_label": [3]},
        "columns image, fine_label, but",
    ),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_files_of_a_part_that_disagree_are_refused_by_name(tmp_path, kind):
    first, second, message = DIFFERENT[kind]
    pq.write_table(pa.table(first), tmp_path / "a.parquet")
    pq.write_table(pa.table(second), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=rf"b\.parquet has {message}"):
        ParquetSource(tmp_path)


@pytest.mark.parametrize("other", [["dog", "cat", "wolf"], ["cat", "dog"], None])
def test_files_of_a_part_that_name_other_classes_or_another_order_are_refused(tmp_path, other):
    write(tmp_path / "a.parquet", range(4), names=["cat", "dog", "wolf"])
    write(tmp_path / "b.parquet", range(2), names=other)
    with pytest.raises(DataError, match=r"b\.parquet has classes .*, but a\.parquet has cat, dog, wolf"):
        ParquetSource(tmp_path)


def test_parts_that_name_their_classes_in_another_order_are_matched_by_name(tmp_path):
    write(tmp_path / "train.parquet", range(3), names=["cat", "dog", "wolf"])
    write(tmp_path / "val.parquet", range(3), names=["wolf", "cat", "dog"])
    train, val = open_parquet(tmp_path)
    assert [val.class_names[label] for label in val.labels] == ["wolf", "cat", "dog"]
    assert val.class_names == train.class_names


@pytest.mark.parametrize("labels", [[[0], [1]], [{"a": 1}, {"a": 2}]])
def test_several_labels_in_a_cell_are_refused(tmp_path, labels):
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": labels}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column of labels"):
        ParquetSource(tmp_path)


def test_labels_as_floats_are_numbers_and_fractions_are_refused(tmp_path):
    pq.write_table(pa.table({"image": [b"x"] * 3, "label": [2.0, 0.0, 1.0]}), tmp_path / "a.parquet")
    assert ParquetSource(tmp_path).labels.tolist() == [2, 0, 1]
    pq.write_table(pa.table({"image": [b"x"] * 2, "label": [0.0, float("nan")]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a label is nan"):
        ParquetSource(tmp_path)


def test_one_file_is_open_at_a_time(tmp_path, monkeypatch):
    import megabatch.data.sources.parquet as module

    for name in "abc":
        write(tmp_path / f"{name}.parquet", range(3))
    opened, real = [], module._open
    monkeypatch.setattr(module, "_open", lambda path: opened.append(real(path)) or opened[-1])
    source = ParquetSource(tmp_path)
    assert [file.closed for file in opened] == [True] * 3
    assert source.read(8)
    assert opened[-1].closed


def test_damaged_files_are_refused(tmp_path):
    path = write(tmp_path / "a.parquet", range(40))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a readable parquet file"):
        ParquetSource(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="not a readable parquet file"):
        ParquetSource(path)
    with pytest.raises(DataError, match="no parquet files"):
        ParquetSource([])


def test_without_pyarrow_the_error_states_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", range(4))
    real = builtins.__import__

    def no_pyarrow(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    with pytest.raises(DataError, match=r"megabatch\[parquet\]"):
        ParquetSource(path)
