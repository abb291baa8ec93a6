"""Tar shards: what another tool wrote, any sample at any time, and tars that must not be read."""

import io
import os
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from photographs import encode, photograph

from megabatch.data.sources.protocol import EncodedSource
from megabatch.data.sources.shards import ShardSource, open_shards
from megabatch.data.sources.tar_index import index_path, open_index
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
    """`count` samples: not images, as reading does not look inside; sizes differ."""
    members: Members = []
    for i in range(start, start + count):
        members += [(f"{i:05d}.jpg", b"image %d" % i * (1 + i % 7)), (f"{i:05d}.cls", str(i % classes).encode())]
    return members


def test_every_sample_comes_back_with_its_bytes_and_label_in_any_order(tmp_path):
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
    """Folders belong to the key, everything after the first dot of the file name is its ending."""
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


def test_labels_may_be_names_or_numbers_that_a_file_names(tmp_path):
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


def test_the_index_is_made_once_and_used_again(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", samples(9))
    first = ShardSource(path)
    assert index_path(path).exists()
    monkeypatch.setattr("megabatch.data.sources.tar_index.list_members", lambda _: pytest.fail("read the tar again"))
    again = ShardSource(path)
    assert [again.read(i) for i in range(9)] == [first.read(i) for i in range(9)]
    assert again.labels.tolist() == first.labels.tolist()
    assert again.name(5) == first.name(5)


def test_an_index_of_another_tar_is_not_believed(tmp_path):
    path = write_tar(tmp_path / "s.tar", samples(9))
    ShardSource(path)
    write_tar(path, samples(9, start=100))
    assert ShardSource(path).read(0) == b"image 100" * 3
    later = path.stat().st_mtime_ns + 10**10
    write_tar(path, samples(9, start=200))  # same size: only the bytes tell, and the index looks newer
    os.utime(index_path(path), ns=(later, later))
    assert ShardSource(path).read(0) == b"image 200" * (1 + 200 % 7)


def test_a_label_edited_in_place_is_seen(tmp_path):
    members = samples(40)
    path = write_tar(tmp_path / "s.tar", members)
    before = ShardSource(path).labels.copy()
    members[21] = (members[21][0], b"2")
    stat = path.stat()
    write_tar(path, members)
    os.utime(path, ns=(stat.st_atime_ns, index_path(path).stat().st_mtime_ns + 1))
    assert np.flatnonzero(ShardSource(path).labels != before).tolist() == [10]


@pytest.mark.parametrize("damage", [b"", b"{}\n", b"not json\n", None])
def test_a_damaged_index_is_made_anew(tmp_path, damage):
    path = write_tar(tmp_path / "s.tar", samples(9))
    ShardSource(path)
    whole = index_path(path).read_bytes()
    index_path(path).write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert ShardSource(path).read(8) == b"image 8" * 2
    assert index_path(path).read_bytes() == whole


def test_an_index_that_points_outside_the_tar_is_made_anew(tmp_path):
    path = write_tar(tmp_path / "s.tar", samples(9))
    index = open_index(path)
    for field, value in [("offset", 1 << 40), ("offset", -1), ("name", 1 << 40), ("label", 99), ("label", -1)]:
        records = index.records.copy()
        records[field][3] = value
        header, rest = index_path(path).read_bytes().split(b"\n", 1)
        index_path(path).write_bytes(header + b"\n" + records.tobytes() + rest[records.nbytes :])
        assert ShardSource(path).read(3) == b"image 3" * 4


def test_a_folder_that_may_not_be_written_to_is_read_all_the_same(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", samples(4))

    def refuse(*_, **__):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr("megabatch.data.sources.tar_index.write_index", refuse)
    assert len(ShardSource(path)) == 4
    assert not index_path(path).exists()


def test_more_shards_than_files_may_be_open_at_once_are_read_by_many_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("megabatch.data.sources.shards._MAX_OPEN_FILES", 2)
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


def test_a_shard_cut_short_during_a_run_is_an_error_and_no_crash(tmp_path):
    path = write_tar(tmp_path / "s.tar", samples(9))
    source = ShardSource(path)
    os.truncate(path, 4000)
    with pytest.raises(DataError, match="cut since it was indexed"):
        source.read(8)


# ---- what must not be read


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
def test_a_file_that_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"no tar|no samples"):
        ShardSource(tmp_path / "s.tar")


@pytest.mark.parametrize("label", [b"", b"  \n", b"\xff\xfe", b"1\n2"])
def test_a_label_that_is_no_single_word_or_number_is_refused(tmp_path, label):
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b"x"), ("a.cls", label)])
    with pytest.raises(DataError, match="label of 'a'"):
        ShardSource(path)


def test_images_without_labels_are_refused_with_the_way_out(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("cat/1.jpg", b"x"), ("cat/2.jpg", b"x")])
    with pytest.raises(DataError, match=r"no label.*megabatch data pack"):
        ShardSource(path)


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


def test_numeric_classes_of_train_and_val_are_as_many_as_the_highest_says(tmp_path):
    write_tar(tmp_path / "train-0.tar", samples(12, classes=5))
    write_tar(tmp_path / "val-0.tar", samples(2, classes=5))
    train, val = open_shards(tmp_path)
    assert train.class_names == val.class_names == ("0", "1", "2", "3", "4")


def test_a_missing_part_and_different_classes_are_refused(tmp_path):
    write_tar(tmp_path / "train-0.tar", [("a.jpg", b"x"), ("a.cls", b"wolf")])
    with pytest.raises(DataError, match=r"no shards for 'val'.*val-000000\.tar"):
        open_shards(tmp_path)
    write_tar(tmp_path / "val-0.tar", [("a.jpg", b"x"), ("a.cls", b"cat")])
    with pytest.raises(DataError, match="different classes"):
        open_shards(tmp_path)


def test_no_tar_at_all_is_refused(tmp_path):
    with pytest.raises(DataError, match="no tar files"):
        ShardSource(tmp_path)
    with pytest.raises(DataError, match="no file"):
        ShardSource(tmp_path / "missing.tar")


def test_real_images_go_from_shard_to_pixels(tmp_path):
    from megabatch.data.jpeg.decode import decode

    pixels = photograph(30, 40)
    path = write_tar(tmp_path / "s.tar", [("a.png", encode(pixels, "PNG")), ("a.cls", b"0")])
    assert np.array_equal(decode(ShardSource(path).read(0)), pixels)
