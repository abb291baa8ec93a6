"""Tar shards: files of other tools, random access, and tars that must be refused."""

import io
import os
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from photographs import encode, photograph

from megabatch.data.loading.files import read_files
from megabatch.data.loading.held_out import Subset
from megabatch.data.sources.dataset import open_shards
from megabatch.data.sources.protocol import EncodedSource
from megabatch.data.sources.tar.shards import ShardSource
from megabatch.data.sources.tar.tar_index import index_path, open_index
from megabatch.errors import DataError

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(count: int, *, start: int = 0, classes: int = 3) -> Members:
    """`count` samples of different sizes. The content is not an image: reading does not decode it."""
    members: Members = []
    for i in range(start, start + count):
        members += [(f"{i:05d}.jpg", b"image %d" % i * (1 + i % 7)), (f"{i:05d}.cls", str(i % classes).encode())]
    return members


def test_samples_are_read_with_their_bytes_and_labels_in_any_order(tmp_path):
    write_tar(tmp_path / "a-0.tar", samples(20))
    write_tar(tmp_path / "a-1.tar", samples(13, start=20))
    source = ShardSource(tmp_path)
    assert isinstance(source, EncodedSource)
    assert len(source) == 33
    assert list(source.shard_sizes) == [20, 13]
    assert source.class_names == ("0", "1", "2")
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [i % 3 for i in range(33)]
    for i in np.random.default_rng(0).permutation(33):
        assert source.read(int(i)) == b"image %d" % i * (1 + i % 7)
    assert source.name(21) == "a-1.tar:00021.jpg"
    with pytest.raises(IndexError):
        source.read(33)


def test_webdatasets_naming_rules_hold(tmp_path):
    """Folders are part of the key; all of the file name after its first dot is the ending."""
    members = [
        ("./x/dog.7.JPG", b"never"),
        ("x/1.json", b"{}"),
        ("x/1.png", b"one"),
        ("x/1.seg.png", b"mask"),
        ("x/1.cls", b"4\n"),
        ("x/.hidden.jpg", b"no"),
        ("y.1/2.jpeg", b"two"),
        ("y.1/2.cls", b"0"),
    ]
    source = ShardSource(write_tar(tmp_path / "s.tar", members[1:]))
    assert [source.read(i) for i in range(2)] == [b"one", b"two"]
    assert source.labels.tolist() == [4, 0]
    assert len(source.class_names) == 5
    with pytest.raises(DataError, match=r"sample './x/dog' has no image .*7\.jpg"):
        ShardSource(write_tar(tmp_path / "t.tar", members))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect_and_long_names_are_read(tmp_path, format):
    long = "folder/" + "n" * (90 if format == tarfile.USTAR_FORMAT else 180)
    members = [(f"{long}.jpg", b"pixels"), (f"{long}.cls", b"0")]
    source = ShardSource(write_tar(tmp_path / "s.tar", members, format=format))
    assert source.read(0) == b"pixels"
    assert source.name(0) == f"s.tar:{long}.jpg"


def test_labels_may_be_names_or_numbers_that_classes_txt_names(tmp_path):
    write_tar(tmp_path / "n" / "s.tar", [("a.jpg", b"x"), ("a.cls", b"wolf"), ("b.jpg", b"y"), ("b.cls", b"cat")])
    source = ShardSource(tmp_path / "n")
    assert source.class_names == ("cat", "wolf")
    assert source.labels.tolist() == [1, 0]
    write_tar(tmp_path / "s.tar", samples(5))
    (tmp_path / "classes.txt").write_text("cat\ndog\nwolf\nyak\n")
    source = ShardSource(tmp_path / "s.tar")
    assert source.class_names == ("cat", "dog", "wolf", "yak")
    assert source.labels.tolist() == [0, 1, 2, 0, 1]


def test_a_label_outside_the_named_classes_is_refused(tmp_path):
    path = write_tar(tmp_path / "s.tar", samples(5))
    with pytest.raises(DataError, match="label '2' is neither a class name nor a number below 2"):
        ShardSource(path, class_names=["cat", "dog"])


# ---- the index


def test_the_index_is_built_once_and_reused(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", samples(9))
    first = ShardSource(path)
    assert index_path(path).exists()
    monkeypatch.setattr(
        "megabatch.data.sources.tar.tar_index.list_members", lambda _: pytest.fail("read the tar again")
    )
    again = ShardSource(path)
    assert [again.read(i) for i in range(9)] == [first.read(i) for i in range(9)]
    assert again.labels.tolist() == first.labels.tolist()
    assert again.name(5) == first.name(5)


def test_an_index_of_another_tar_is_not_used(tmp_path):
    path = write_tar(tmp_path / "s.tar", samples(9))
    ShardSource(path)
    write_tar(path, samples(9, start=100))
    assert ShardSource(path).read(0) == b"image 100" * 3
    later = path.stat().st_mtime_ns + 10**10
    write_tar(path, samples(9, start=200))  # same size and an index that looks newer: only the content differs
    os.utime(index_path(path), ns=(later, later))
    assert ShardSource(path).read(0) == b"image 200" * (1 + 200 % 7)


def test_a_label_edited_in_place_is_detected(tmp_path):
    members = samples(40)
    path = write_tar(tmp_path / "s.tar", members)
    before = ShardSource(path).labels.copy()
    members[21] = (members[21][0], b"2")
    stat = path.stat()
    write_tar(path, members)
    os.utime(path, ns=(stat.st_atime_ns, index_path(path).stat().st_mtime_ns + 1))
    assert np.flatnonzero(ShardSource(path).labels != before).tolist() == [10]


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"not json\n", None])
def test_a_damaged_index_is_rebuilt(tmp_path, damage):
    path = write_tar(tmp_path / "s.tar", samples(9))
    ShardSource(path)
    whole = index_path(path).read_bytes()
    index_path(path).write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert ShardSource(path).read(8) == b"image 8" * 2
    assert index_path(path).read_bytes() == whole


def test_an_index_with_numbers_out_of_bounds_is_rebuilt(tmp_path):
    path = write_tar(tmp_path / "s.tar", samples(9))
    index = open_index(path)
    for field, value in [("offset", 1 << 40), ("offset", -1), ("name", 1 << 40), ("label", 99), ("label", -1)]:
        records = index.records.copy()
        records[field][3] = value
        header, rest = index_path(path).read_bytes().split(b"\n", 1)
        index_path(path).write_bytes(header + b"\n" + records.tobytes() + rest[records.nbytes :])
        assert ShardSource(path).read(3) == b"image 3" * 4


def test_shards_in_a_read_only_folder_are_read_without_writing_an_index(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", samples(4))

    def refuse(*_, **__):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr("megabatch.data.sources.tar.tar_index.write_index", refuse)
    assert len(ShardSource(path)) == 4
    assert not index_path(path).exists()


def test_threads_read_more_shards_than_files_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr("megabatch.data.sources.tar.shards._MAX_OPEN_FILES", 2)
    for shard in range(6):
        write_tar(tmp_path / f"s-{shard}.tar", samples(10, start=10 * shard))
    source = ShardSource(tmp_path)
    wrong = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 60, 300):
            if source.read(int(i)) != b"image %d" % i * (1 + i % 7):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_shard_truncated_during_a_run_is_an_error_not_a_crash(tmp_path):
    path = write_tar(tmp_path / "s.tar", samples(9))
    source = ShardSource(path)
    os.truncate(path, 4000)
    with pytest.raises(DataError, match="truncated after it was indexed"):
        source.read(8)


# ---- archives that are refused


def test_many_samples_are_read_at_once_as_one_by_one(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", samples(20, start=20 * number))
    source = ShardSource(tmp_path)
    indices = np.random.default_rng(0).integers(60, size=40)
    for one in (source, Subset(source, np.arange(59, -1, -1))):
        data, starts = one.read_many(indices)
        assert len(data) == starts[-1]
        files = read_files(one, indices)
        for row, index in enumerate(indices.tolist()):
            assert files.file(row) == data[starts[row] : starts[row + 1]].tobytes() == one.read(index)
        assert [tensor.numpy().tobytes() for tensor in files.tensors()] == [one.read(i) for i in indices.tolist()]
    assert len(source.read_many(indices[:0])[0]) == 0


def test_of_a_truncated_shard_only_the_files_that_are_gone_are_missing(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(20))
    source = ShardSource(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=r"a\.tar ends before byte \d+; it was truncated"):
        source.read_many(np.arange(20))
    files = read_files(source, np.arange(20))
    assert files.file(0) == source.read(0)
    assert files.file(19) == b""


def test_a_compressed_tar_is_refused_with_the_reason(tmp_path):
    for mode, ending, name in [("w:gz", ".gz", "gzip"), ("w:bz2", ".bz2", "bzip2"), ("w:xz", ".xz", "xz")]:
        path = write_tar(tmp_path / name / f"s.tar{ending}", samples(3), mode=mode)
        with pytest.raises(DataError, match=f"compressed with {name}.*unpack it"):
            ShardSource(path.parent)
    renamed = write_tar(tmp_path / "s.tar", samples(3), mode="w:gz")
    with pytest.raises(DataError, match="gzip"):
        ShardSource(renamed)


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "a\\..\\x.jpg"])
def test_names_that_leave_the_archive_are_refused(tmp_path, name):
    path = write_tar(tmp_path / "s.tar", [*samples(1), (name, b"x"), (name[:-3] + "cls", b"0")])
    with pytest.raises(DataError, match="leaves the archive"):
        ShardSource(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = write_tar(tmp_path / "s.tar", samples(1))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("b.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match=r"'b\.jpg' is a link, a device"):
        ShardSource(path)


@pytest.mark.parametrize("keep", [100, 700, 1600, 3 * 1024 + 100])
def test_a_truncated_tar_is_refused(tmp_path, keep):
    path = write_tar(tmp_path / "s.tar", [("a.cls", b"0"), ("a.jpg", b"x" * 9000)])
    os.truncate(path, keep)
    with pytest.raises(DataError, match=r"truncated|damaged|no image"):
        ShardSource(path)


@pytest.mark.parametrize("content", [b"", b"hello" * 1000])
def test_a_file_that_is_not_a_tar_is_refused(tmp_path, content):
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"not a tar|no samples"):
        ShardSource(tmp_path / "s.tar")


@pytest.mark.parametrize("label", [b"", b"  \n", b"\xff\xfe", b"1\n2"])
def test_a_label_that_is_not_one_line_of_text_is_refused(tmp_path, label):
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b"x"), ("a.cls", label)])
    with pytest.raises(DataError, match="label of 'a'"):
        ShardSource(path)


def test_images_without_labels_are_refused_with_a_command_that_helps(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("cat/1.jpg", b"x"), ("cat/2.jpg", b"x")])
    with pytest.raises(DataError, match=r"no label.*megabatch data pack"):
        ShardSource(path)


def test_names_with_several_dots_are_refused_in_a_short_line_that_says_why(tmp_path):
    path = write_tar(tmp_path / "s.tar", [(f"photo.v1.{i}.{end}", b"0") for i in range(300) for end in ("jpg", "cls")])
    with pytest.raises(DataError, match=r"begins at the first dot of a name.*names without other dots") as caught:
        ShardSource(path)
    assert len(str(caught.value)) < 400


def test_few_files_stay_open_if_the_process_may_open_few(tmp_path, monkeypatch):
    import resource

    for i in range(20):
        write_tar(tmp_path / f"{i:02d}.tar", samples(1))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))
    source = ShardSource(tmp_path)
    assert [source.read(i) for i in range(20)] == [source.read(0)] * 20
    assert len(source._files._files) == 2


# ---- train and val


@pytest.mark.parametrize("layout", ["{part}-{shard}.tar", "{part}/{shard}.tar"])
def test_train_and_val_are_found_by_name_or_by_folder(tmp_path, layout):
    for part, count in [("train", 12), ("val", 5)]:
        for shard in range(2):
            write_tar(tmp_path / layout.format(part=part, shard=shard), samples(count, start=count * shard))
    (tmp_path / "classes.txt").write_text("cat\ndog\nwolf\n")
    train, val = open_shards(tmp_path)
    assert (len(train), len(val)) == (24, 10)
    assert train.class_names == val.class_names == ("cat", "dog", "wolf")


def test_the_highest_numeric_label_of_train_and_val_gives_the_number_of_classes(tmp_path):
    write_tar(tmp_path / "train-0.tar", samples(12, classes=5))
    write_tar(tmp_path / "val-0.tar", samples(2, classes=5))
    train, val = open_shards(tmp_path)
    assert train.class_names == val.class_names == ("0", "1", "2", "3", "4")


def test_a_missing_part_and_different_classes_are_refused(tmp_path):
    write_tar(tmp_path / "train-0.tar", [("a.jpg", b"x"), ("a.cls", b"wolf")])
    with pytest.raises(DataError, match=r"no images for 'val'.*val-000000\.tar"):
        open_shards(tmp_path)
    write_tar(tmp_path / "val-0.tar", [("a.jpg", b"x"), ("a.cls", b"cat")])
    with pytest.raises(DataError, match="classes of train and val differ"):
        open_shards(tmp_path)


def test_a_folder_without_tars_is_refused(tmp_path):
    with pytest.raises(DataError, match="no tar files"):
        ShardSource(tmp_path)
    with pytest.raises(DataError, match="no file"):
        ShardSource(tmp_path / "missing.tar")


def test_images_in_shards_decode_to_their_pixels(tmp_path):
    from megabatch.data.jpeg.decode import decode

    pixels = photograph(30, 40)
    path = write_tar(tmp_path / "s.tar", [("a.png", encode(pixels, "PNG")), ("a.cls", b"0")])
    assert np.array_equal(decode(ShardSource(path).read(0)), pixels)
