"""Mutated tars, their indexes, parquet files, class lists and tars of folders: a data set, or DataError."""

import io
import shutil
import tarfile

import pytest
from mutations import mutate_bytes, mutate_json_text, run_cases
from photographs import encode, photograph
from slow import slow_except

from megabatch.data.sources.dataset import open_dataset
from megabatch.data.sources.tar.tar_index import index_path, open_index
from megabatch.errors import DataError

COUNTS = slow_except([40, 1000], 40)


def write_tar(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            content = encode(photograph(24, 24, len(name))) if name.endswith("jpg") else b"%d" % (len(name) % 2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """A data set of two tars with indexes and a list of classes."""
    folder = tmp_path / "original"
    folder.mkdir()
    for part in ("train", "val"):
        write_tar(folder / f"{part}-000000.tar", [f"{'0' * n}{n}.{end}" for n in range(6) for end in ("jpg", "cls")])
        open_index(folder / f"{part}-000000.tar")
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


def use(folder) -> bool:
    """Opens the data set and reads every sample."""
    for source in open_dataset(folder).parts.values():
        assert len(source.labels) == len(source)
        for index in range(len(source)):
            try:
                assert isinstance(source.read(index), bytes)
            except (DataError, OSError):  # training replaces the sample
                continue
            assert isinstance(source.name(index), str)
            assert isinstance(source.class_names[source.labels[index]], str)
    return True


def copy_of(original, folder):
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(original, folder)


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_shards(count, shards, tmp_path):
    def case(rng):
        folder = copy_of(shards, tmp_path / "mutated")
        tar = folder / "train-000000.tar"
        tar.write_bytes(mutate_bytes(tar.read_bytes(), rng))
        if rng.random() < 0.5:
            index_path(tar).unlink()
        return use(folder)

    outcomes = run_cases("tar shards", count, case)
    assert min(outcomes["accepted"], outcomes["refused"]) > 0


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_indexes(count, shards, tmp_path):
    """Half of them keep their form, as those of an attacker do: a header line and records of the same size."""

    def case(rng):
        folder = copy_of(shards, tmp_path / "mutated")
        path = index_path(folder / "train-000000.tar")
        header, _, body = path.read_bytes().partition(b"\n")
        if rng.random() < 0.5:
            header = mutate_json_text(header.decode(), rng).replace(b"\n", b" ")
        else:
            body = mutate_bytes(body, rng)
        path.write_bytes(header + b"\n" + body)
        return use(folder)

    assert run_cases("tar indexes", count, case)["accepted"] == count  # a bad index is built again


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_class_lists(count, shards, tmp_path):
    def case(rng):
        folder = copy_of(shards, tmp_path / "mutated")
        path = folder / "classes.txt"
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        return use(folder)

    outcomes = run_cases("class lists", count, case)
    assert min(outcomes["accepted"], outcomes["refused"]) > 0


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_tars_of_folders(count, tmp_path):
    original = tmp_path / "original.tar"
    write_tar(
        original, [f"photos/{part}/{name}/{n}.jpg" for part in ("train", "val") for name in "ab" for n in range(3)]
    )

    def case(rng):
        path = tmp_path / "mutated.tar"
        path.write_bytes(mutate_bytes(original.read_bytes(), rng))
        return use(path)

    outcomes = run_cases("tars of folders", count, case)
    assert min(outcomes["accepted"], outcomes["refused"]) > 0


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_parquet_files(count, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    original = tmp_path / "original"
    original.mkdir()
    image = {"bytes": encode(photograph(24, 24)), "path": "a.jpg"}
    table = pyarrow.table({"image": [image] * 6, "label": [0, 1] * 3})
    for part in ("train", "validation"):
        parquet.write_table(table, original / f"{part}-00000-of-00001.parquet")

    def case(rng):
        folder = copy_of(original, tmp_path / "mutated")
        path = folder / "train-00000-of-00001.parquet"
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        return use(folder)

    outcomes = run_cases("parquet files", count, case)
    assert min(outcomes["accepted"], outcomes["refused"]) > 0
