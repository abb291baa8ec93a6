"""Packing: same bytes for any number of workers, no sample lost, no image enlarged, interrupted runs resumed."""

import errno
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from photographs import encode, photograph
from PIL import Image

from megabatch.data.jpeg.decode import decode
from megabatch.data.packing.pack import pack
from megabatch.data.packing.shard import reencode
from megabatch.data.sources.dataset import open_shards
from megabatch.data.sources.folder import FolderSource
from megabatch.data.sources.tar.shards import ShardSource
from megabatch.errors import DataError

CLASSES = ("cat", "dog", "yak")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train with 31 images and val with 9, of three classes; some are large, one is a PNG with a JPEG's extension."""
    root = tmp_path_factory.mktemp("images")
    for part, per_class in [("train", 10), ("val", 3)]:
        for number, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(per_class):
                size = (90, 120) if i % 3 else (40, 30)
                data = encode(photograph(*size, seed=100 * number + i + (50 if part == "val" else 0)))
                (root / part / name / f"{i}.v1.jpg").write_bytes(data)
    (root / "train" / "cat" / "odd.jpg").write_bytes(encode(photograph(30, 30), "PNG"))
    return root


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def samples(source) -> Counter[tuple[bytes, str]]:
    return Counter((source.read(i), source.class_names[source.labels[i]]) for i in range(len(source)))


def test_every_file_is_stored_once_unchanged_and_with_its_class(folder, tmp_path):
    report = pack(folder, tmp_path / "out", shard_bytes=20_000)
    train, val = open_shards(tmp_path / "out")
    assert samples(train) == samples(FolderSource(folder / "train"))
    assert samples(val) == samples(FolderSource(folder / "val"))
    assert report.num_samples == {"train": 31, "val": 9}
    assert report.num_shards == len(train.shard_sizes) + len(val.shard_sizes) > 4
    assert report.num_reencoded == 0
    assert report.class_names == train.class_names == CLASSES


def test_the_result_does_not_depend_on_the_number_of_workers(folder, tmp_path):
    for workers in (1, 2, 5):
        pack(folder, tmp_path / str(workers), shard_bytes=20_000, max_side=64, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")


def test_each_image_is_followed_by_its_label_and_no_time_or_owner_is_stored(folder, tmp_path):
    pack(folder, tmp_path, shard_bytes=20_000)
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        keys = [m.name.rsplit(".", 1)[0] for m in members]
        assert keys[0::2] == keys[1::2] == sorted(keys[0::2])
        assert all("." not in key for key in keys)
        assert {m.name.rsplit(".", 1)[1] for m in members[1::2]} == {"cls"}


def test_the_stored_extension_is_that_of_the_files_format(folder, tmp_path):
    pack(folder, tmp_path)
    assert "cat/odd.png" in set(ShardSource(tmp_path / "train-000000.tar").member_names())


def test_each_shard_mixes_classes(folder, tmp_path):
    pack(folder, tmp_path, shard_bytes=40_000)
    train, _ = open_shards(tmp_path)
    ends = np.cumsum(train.shard_sizes)
    mixtures = [set(train.labels[end - size : end]) for end, size in zip(ends, train.shard_sizes, strict=True)]
    assert sum(len(classes) > 1 for classes in mixtures) >= len(mixtures) - 1


def test_shards_have_about_the_requested_size(folder, tmp_path):
    pack(folder, tmp_path, shard_bytes=20_000)
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("train-*.tar"))]
    assert all(size < 20_000 + 9_000 + 10_240 for size in sizes)  # one more sample, and the padding of a tar
    assert all(size > 20_000 - 9_000 for size in sizes[:-1])


def test_the_manifest_has_the_checksum_of_every_shard(folder, tmp_path):
    pack(folder, tmp_path, shard_bytes=20_000)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    shards = {name: digest for name, digest in contents(tmp_path).items() if name.endswith(".tar")}
    assert {name: entry["sha256"] for name, entry in manifest["shards"].items()} == shards
    assert sum(entry["samples"] for entry in manifest["shards"].values()) == 40
    assert manifest["classes"] == list(CLASSES)


# ---- interrupted and resumed


def test_finished_shards_are_kept_and_the_others_are_made(folder, tmp_path):
    whole = pack(folder, tmp_path / "whole", shard_bytes=20_000)
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append((done, total))
        if done == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(folder, tmp_path / "out", shard_bytes=20_000, workers=1, on_progress=stop)
    assert calls == [(i, 40) for i in range(1, 26)]
    assert not list((tmp_path / "out").glob("*.part"))
    finished = len(list((tmp_path / "out").glob("*.tar")))
    assert 0 < finished < whole.num_shards
    report = pack(folder, tmp_path / "out", shard_bytes=20_000)
    assert report.num_kept_shards == finished
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert pack(folder, tmp_path / "out", shard_bytes=20_000).num_kept_shards == whole.num_shards


def test_a_shard_that_is_damaged_or_has_other_options_is_written_again(folder, tmp_path):
    first = pack(folder, tmp_path, shard_bytes=20_000)
    before = contents(tmp_path)
    victim = sorted(tmp_path.glob("*.tar"))[1]
    damaged = bytearray(victim.read_bytes())
    damaged[5000] ^= 1
    victim.write_bytes(damaged)
    assert pack(folder, tmp_path, shard_bytes=20_000).num_kept_shards == first.num_shards - 1
    assert contents(tmp_path) == before
    assert pack(folder, tmp_path, shard_bytes=20_000, quality=50).num_kept_shards == 0
    assert contents(tmp_path) != before


def test_changed_sources_are_packed_again(folder, tmp_path):
    source = tmp_path / "source" / "cat"
    source.mkdir(parents=True)
    (source / "1.jpg").write_bytes(encode(photograph(20, 20)))
    pack(source.parent, tmp_path / "out")
    (source / "1.jpg").write_bytes(encode(photograph(20, 20), quality=40))
    report = pack(source.parent, tmp_path / "out")
    assert report.num_kept_shards == 0
    assert ShardSource(tmp_path / "out").read(0) == (source / "1.jpg").read_bytes()


def test_a_destination_with_other_shards_or_inside_the_source_is_rejected(folder, tmp_path):
    pack(folder, tmp_path / "out", shard_bytes=20_000)
    with pytest.raises(DataError, match=r"holds .*\.tar, which is not a shard of this data set"):
        pack(folder, tmp_path / "out", shard_bytes=10**9)
    for inside in (folder, folder / "packed"):
        with pytest.raises(DataError, match="is inside"):
            pack(folder, inside)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        pack(folder, tmp_path / "file")


# ---- re-encoding


def test_only_images_above_max_side_are_reduced(folder, tmp_path):
    report = pack(folder, tmp_path, max_side=64)
    train, _ = open_shards(tmp_path)
    originals = samples(FolderSource(folder / "train"))
    for i in range(len(train)):
        data = train.read(i)
        if (data, train.class_names[train.labels[i]]) not in originals:
            assert decode(data).shape == (48, 64, 3)
            assert data[:3] == b"\xff\xd8\xff"
        else:
            assert max(decode(data).shape[:2]) <= 64
    assert report.num_reencoded == 18 + 6


def test_a_reduced_image_looks_like_the_original():
    pixels = photograph(200, 300)
    small = decode(reencode(encode(pixels, quality=95), max_side=150, quality=90))
    reference = np.asarray(Image.fromarray(pixels).resize((150, 100), Image.Resampling.LANCZOS), dtype=float)
    assert small.shape == (100, 150, 3)
    assert np.abs(small - reference).mean() < 3.0


def test_quality_alone_keeps_the_size_and_never_makes_a_jpeg_larger():
    pixels = photograph(60, 80)
    fine, coarse = encode(pixels, quality=95), encode(pixels, quality=30)
    again = reencode(fine, max_side=None, quality=60)
    assert len(again) < len(fine)
    assert decode(again).shape == (60, 80, 3)
    assert reencode(coarse, max_side=None, quality=95) is coarse
    assert reencode(encode(pixels, "PNG"), max_side=None, quality=95)[:3] == b"\xff\xd8\xff"
    assert reencode(fine, max_side=None, quality=None) is fine
    assert reencode(fine, max_side=80, quality=None) is fine


def test_a_bad_image_stops_reencoding_or_is_skipped_and_reported(tmp_path):
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cat" / "good.jpg").write_bytes(encode(photograph(50, 50)))
    (tmp_path / "in" / "cat" / "bad.jpg").write_bytes(encode(photograph(50, 50))[:-300])
    with pytest.raises(DataError, match=r"bad\.jpg.*damaged.*skip_bad=True"):
        pack(tmp_path / "in", tmp_path / "out", max_side=20)
    assert not list((tmp_path / "out").glob("*.tar"))
    for _ in range(2):  # the second call keeps the shard of the first
        report = pack(tmp_path / "in", tmp_path / "out", max_side=20, skip_bad=True)
        assert report.num_samples == {"train": 1}
        assert [Path(name).name for name, _ in report.skipped] == ["bad.jpg"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"][0][0].endswith("bad.jpg")


@pytest.mark.parametrize("options", [{"max_side": 0}, {"quality": 0}, {"quality": 101}, {"shard_bytes": 0}])
def test_options_out_of_range_are_rejected_with_a_value_that_works(folder, tmp_path, options):
    with pytest.raises(DataError, match=r"for example \d+"):
        pack(folder, tmp_path / "out", **options)


# ---- other inputs


def tar_of(folder: Path, path: Path, prefix: str) -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=prefix)
    return path


def test_a_tar_of_class_folders_gives_the_same_shards_as_the_folders(folder, tmp_path):
    (tmp_path / "in").mkdir()
    tar = tar_of(folder, tmp_path / "in" / "images.tar", "some/where")
    for source, out in [(folder, "a"), (tar, "b"), (tar.parent, "c")]:
        pack(source, tmp_path / out, shard_bytes=20_000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")


def test_one_folder_of_classes_becomes_train(folder, tmp_path):
    assert pack(folder / "val", tmp_path / "a").num_samples == {"train": 9}
    tar = tar_of(folder / "val", tmp_path / "val.tar", "stuff")
    assert pack(tar, tmp_path / "b").num_samples == {"train": 9}
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_shards_are_packed_into_shards_of_another_size(folder, tmp_path):
    pack(folder, tmp_path / "small", shard_bytes=20_000)
    pack(tmp_path / "small", tmp_path / "one")
    assert len(list((tmp_path / "one").glob("train-*.tar"))) == 1
    for old, new in zip(open_shards(tmp_path / "small"), open_shards(tmp_path / "one"), strict=True):
        assert samples(old) == samples(new)


def test_parquet_is_packed_in_its_own_order(folder, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for part in ("train", "val"):
        source = FolderSource(folder / part)
        table = {"image": [{"bytes": source.read(i)} for i in range(len(source))]}
        table["label"] = [source.class_names[label] for label in source.labels]
        pq.write_table(pa.table(table), tmp_path / f"{part}.parquet", row_group_size=4)
    pack(tmp_path, tmp_path.parent / "from-parquet", shard_bytes=20_000)
    for part, packed in zip(("train", "val"), open_shards(tmp_path.parent / "from-parquet"), strict=True):
        assert samples(packed) == samples(FolderSource(folder / part))


def test_colliding_names_and_names_unsafe_in_a_tar_get_unique_keys(tmp_path):
    (tmp_path / "in" / "a class").mkdir(parents=True)
    for i, name in enumerate(["x.1.jpg", "x_1.jpg", "x_1.png", "back\\slash.jpg", "new\nline.jpg", "ünï.jpg"]):
        (tmp_path / "in" / "a class" / name).write_bytes(b"\xff\xd8\xff" + bytes([i]))
    pack(tmp_path / "in", tmp_path / "out")
    source = ShardSource(tmp_path / "out")
    assert sorted(source.read(i)[3] for i in range(len(source))) == list(range(6))
    assert len(set(source.member_names())) == 6


def test_the_error_for_missing_input_says_what_is_needed(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*missing"):
        pack(tmp_path / "missing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        pack(tmp_path / "empty", tmp_path / "out")
    empty = tmp_path / "e.tar"
    with tarfile.open(empty, "w") as tar:
        tar.addfile(tarfile.TarInfo("readme"), io.BytesIO(b""))
    with pytest.raises(DataError, match="no images in folders of classes"):
        pack(empty, tmp_path / "out")


def test_a_class_name_with_a_line_break_is_rejected(tmp_path):
    (tmp_path / "in" / "cat\ndog").mkdir(parents=True)
    (tmp_path / "in" / "cat\ndog" / "1.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="cannot be stored as a line"):
        pack(tmp_path / "in", tmp_path / "out")


def test_a_full_disk_is_one_error_that_names_the_shard_and_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("megabatch.data.packing.shard._HashingWriter.write", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*out/(train|val)-\d+\.tar'"):
        pack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
