"""Checks a data set with every kind of damaged and odd file: each is reported, and can be repaired or excluded."""

import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from damaged_files import FILES, jpeg, pixels, png
from photographs import encode, photograph
from PIL import Image

from megabatch.data.checking.check import CheckReport, check
from megabatch.data.checking.check_file import BAD_KINDS, KINDS, ODD_KINDS, inspect_image
from megabatch.data.checking.repair import REPAIRS, exclude, repair
from megabatch.data.jpeg.decode import decode
from megabatch.data.sources.folder import FolderSource
from megabatch.errors import DataError

LAYOUT = {  # created by `folder`
    "train/cat/zz-copy.jpg": {"duplicate"},
    "train/dog/copy-of-cat.jpg": {"two classes"},
    "val/cat/from-train.jpg": {"train in val"},
    "train/cat/out.jpg": {"link out"},
    "train/cat/lost.jpg": {"broken link"},
    "train/cat/pipe.jpg": {"special file"},
    "train/cat/Good.jpg": {"case clash"},
    "train/cat/good.jpg": {"case clash"},
    "train/none": {"empty class"},
    "train/only": {"class in train alone"},
    "val/none": {"class not in train"},
    "train/classless.jpg": {"no class"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for name in ("train/cat", "train/dog", "train/none", "train/only", "val/cat", "val/dog", "val/none"):
        (root / name).mkdir(parents=True)
    for name, content, _ in FILES:
        (root / "train" / "cat" / name).write_bytes(content())
    good = jpeg()
    for name in ("train/cat/good.jpg", "train/cat/zz-copy.jpg", "train/dog/copy-of-cat.jpg", "val/cat/from-train.jpg"):
        (root / name).write_bytes(good)
    for name in ("cat/Good.jpg", "dog/fine.jpg", "only/fine.jpg", "classless.jpg", "cat/kept.jpg.orig"):
        (root / "train" / name).write_bytes(jpeg())
    (root / "val" / "dog" / "inside.jpg").write_bytes(jpeg())
    (root / "val" / "dog" / "linked.jpg").symlink_to("inside.jpg")
    (root / "val" / "none" / "good.jpg").write_bytes(jpeg())
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    (root / "train" / "cat" / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "train" / "cat" / "lost.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(root / "train" / "cat" / "pipe.jpg")
    return root


def found(report: CheckReport) -> dict[str, set[str]]:
    kinds: dict[str, set[str]] = {}
    for problem in report.problems:
        kinds.setdefault(problem.name, set()).add(problem.kind)
    return kinds


def test_exactly_the_damaged_and_odd_files_are_reported(folder):
    assert len(FILES) + len(LAYOUT) > 30
    expected = {f"train/cat/{name}": kinds for name, _, kinds in FILES} | LAYOUT
    expected["val/dog/linked.jpg"] = {"duplicate"}  # a link within the data set is read as a file
    report = check(folder)
    assert found(report) == expected
    assert all(problem.kind in KINDS for problem in report.problems)
    assert not BAD_KINDS & ODD_KINDS
    assert [problem.name for problem in report.problems] == sorted(problem.name for problem in report.problems)


@pytest.mark.slow
def test_a_file_is_bad_exactly_if_it_cannot_be_decoded(folder):
    bad = {problem.name for problem in check(folder).bad}
    for name, content, _ in FILES:
        if Path(name).suffix in {".txt", ""} or name.startswith("."):
            continue
        try:
            decode(content())
            usable = True
        except DataError:
            usable = False
        assert usable == (f"train/cat/{name}" not in bad), name


@pytest.mark.slow
def test_this_file_tests_every_kind_of_problem(folder):
    found_kinds = {problem.kind for problem in check(folder).problems}
    assert KINDS - found_kinds == {"unreadable", "no reader", "refused archive", "refused data set", "not read"}


@pytest.mark.slow
def test_workers_and_progress_do_not_change_the_report(folder):
    calls: list[tuple[int, int]] = []
    one, four = check(folder, workers=1), check(folder, workers=4, on_progress=lambda *call: calls.append(call))
    assert one == four
    assert calls == [(i, one.num_images) for i in range(1, one.num_images + 1)]


@pytest.mark.slow
def test_a_file_without_read_permission_is_reported(folder, monkeypatch):
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "fine.jpg":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "unreadable" in found(check(folder))["train/dog/fine.jpg"]


def test_a_clean_folder_has_no_problems(tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i, options in enumerate([{}, {"progressive": True}, {"mode": "L"}, {"format": "PNG"}]):
                ending = "png" if "format" in options else "JPG"
                (tmp_path / part / name / f"{i}.{ending}").write_bytes(jpeg(**options))
    report = check(tmp_path)
    assert report.problems == []
    assert report.num_images == 16
    assert check(tmp_path / "train").problems == []


def test_an_image_may_have_several_problems_at_once():
    kinds = {
        kind for kind, _ in inspect_image(png(Image.fromarray(photograph(8, 120)[..., 0].astype(np.uint16))), "jpg")
    }
    assert kinds == {"wrong ending", "tiny", "elongated", "16 bit", "blank"}


# ---- tars and parquet


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_every_sample_of_a_shard_is_checked(tmp_path):
    good = jpeg()
    samples = [("a.jpg", good), ("b.jpg", jpeg()[:-400]), ("c.jpg", encode(pixels(), "PNG")), ("d.jpg", b"")]
    members = [member for name, data in samples for member in [(name, data), (name[0] + ".cls", b"0")]]
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "val-0.tar", [("x.jpg", good), ("x.cls", b"0")])
    write_tar(tmp_path / "train-1.tar", [("../up.jpg", good), ("../up.cls", b"0")])
    write_tar(tmp_path / "train-2.tar.gz", members, "w:gz")
    report = check(tmp_path)
    assert found(report) == {
        "train-0.tar:b.jpg": {"truncated"},
        "train-0.tar:c.jpg": {"wrong ending"},
        "train-0.tar:d.jpg": {"empty"},
        "val-0.tar:x.jpg": {"train in val"},
        "train-1.tar": {"refused archive"},
        "train-2.tar.gz": {"refused archive"},
    }
    assert found(check(tmp_path / "val-0.tar")) == {}
    with pytest.raises(DataError, match=r"pack.*--skip-bad"):
        repair(report)
    with pytest.raises(DataError, match=r"pack.*--skip-bad"):
        exclude(report)


def test_what_only_the_whole_data_set_shows_is_reported(tmp_path):
    good = jpeg()
    write_tar(tmp_path / "train-0.tar", [("a.jpg", good), ("a.cls", b"cat"), ("b.jpg", jpeg()), ("b.cls", b"dog")])
    write_tar(tmp_path / "val-0.tar", [("c.jpg", good + b"0"), ("c.cls", b"yak")])
    write_tar(tmp_path / "devkit.tar", [("readme", b"")])
    assert check(tmp_path).count() >= Counter({"class not in train": 1, "class in train alone": 2, "not read": 1})
    write_tar(tmp_path / "val-0.tar", [("c.jpg", good + b"0"), ("c.cls", b"cat")])
    report = check(tmp_path)
    assert report.bad == []
    assert found(report)["train/dog"] == {"class in train alone"}
    for name in ("train-0.tar", "val-0.tar"):
        write_tar(tmp_path / name, [("x.jpg", jpeg()), ("x.cls", b"5000")])
    (refused,) = check(tmp_path).bad
    assert refused.kind == "refused data set"
    assert "as if they were identifiers" in refused.detail


def test_a_class_folder_without_permission_is_reported(folder, monkeypatch):
    import os

    scan = os.scandir

    def refuse(path):
        if str(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert found(check(folder))["train/dog"] >= {"unreadable"}


def test_images_in_folders_of_a_tar_are_checked(tmp_path):
    write_tar(
        tmp_path / "x.tar", [("train/cat/1.jpg", jpeg()), ("train/dog/2.jpg", b""), ("val/cat/3.jpg", jpeg()[:-400])]
    )
    assert {problem.name: problem.kind for problem in check(tmp_path).bad} == {
        "x.tar:train/dog/2.jpg": "empty",
        "x.tar:val/cat/3.jpg": "truncated",
    }


def test_every_parquet_row_is_checked(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    images = [{"bytes": data} for data in (jpeg(), b"", jpeg(mode="CMYK"))]
    pq.write_table(pa.table({"image": images, "label": [0, 0, 0]}), tmp_path / "train.parquet")
    assert found(check(tmp_path)) == {"train.parquet:1": {"empty"}, "train.parquet:2": {"CMYK"}}


# ---- repair and exclude


def test_repair_in_place_keeps_every_original_and_fixes_every_repairable_kind(folder):
    before = {path.name: path.read_bytes() for path in (folder / "train" / "cat").iterdir() if path.is_file()}
    done = repair(check(folder))
    after = check(folder)
    assert not {problem.kind for problem in after.problems} & (set(REPAIRS) - {"rotated"})
    assert "rotated" in after.count()
    assert {problem.kind for problem, _ in done.done} == set(REPAIRS) - {"rotated"}
    for problem, path in done.done:
        name = Path(problem.name).name
        assert (folder / "train" / "cat" / f"{name}.orig").read_bytes() == before[name]
        assert inspect_image(path.read_bytes(), path.suffix[1:]) == []
    untouched = [name for name, data in before.items() if not (folder / "train" / "cat" / f"{name}.orig").exists()]
    assert all((folder / "train" / "cat" / name).read_bytes() == before[name] for name in untouched)
    assert sorted(problem.name for problem in done.bad) == sorted(problem.name for problem in after.bad)


@pytest.mark.slow
def test_repaired_files_decode_to_the_pixels_of_the_originals(folder):
    report = check(folder)
    for problem, path in repair(report, kinds={"CMYK", "16 bit", "animated", "wrong ending"}).done:
        original = (folder / (problem.name + ".orig")).read_bytes()
        assert np.abs(decode(path.read_bytes()).astype(int) - decode(original)).mean() < 3.0
        assert path.suffix == {"CMYK": ".jpg", "16 bit": ".png", "animated": ".png"}.get(problem.kind, path.suffix)


@pytest.mark.slow
def test_repair_into_another_folder_leaves_the_data_set_unchanged(folder, tmp_path):
    before = found(check(folder))
    done = repair(check(folder), into=tmp_path / "repaired")
    assert found(check(folder)) == before
    assert not list(folder.rglob("*.part"))
    assert all(path.is_relative_to(tmp_path / "repaired" / "train" / "cat") for _, path in done.done)


@pytest.mark.slow
def test_rotation_is_repaired_only_on_request(folder):
    done = repair(check(folder), kinds={"rotated"})
    assert [problem.kind for problem, _ in done.done] == ["rotated"]
    assert decode(done.done[0][1].read_bytes()).shape == (64, 48, 3)
    assert "rotated" not in check(folder).count()


@pytest.mark.slow
def test_a_kind_that_cannot_be_repaired_is_rejected(folder):
    with pytest.raises(DataError, match=r"'empty' cannot be repaired; kinds that can: .*CMYK"):
        repair(check(folder), kinds={"empty"})


def test_repair_never_overwrites_an_existing_file(tmp_path):
    (tmp_path / "cat").mkdir()
    neighbour = encode(pixels(), "PNG")
    (tmp_path / "cat" / "1.png").write_bytes(neighbour)
    (tmp_path / "cat" / "1.jpg").write_bytes(encode(pixels(), "PNG"))
    ((_, path),) = repair(check(tmp_path)).done
    assert path.name == "1-2.png"
    assert (tmp_path / "cat" / "1.png").read_bytes() == neighbour


def test_exclude_moves_all_bad_files_and_training_can_read_the_others(folder):
    everything = {path.relative_to(folder) for path in folder.rglob("*")}
    report = check(folder)
    done = exclude(report)
    aside = folder.with_name("set.excluded")
    moved = {path.relative_to(aside) for _, path in done.done}
    assert {path.relative_to(folder) for path in folder.rglob("*")} | moved == everything
    assert not any((folder / path).exists() for path in moved)
    assert all(os.path.lexists(path) and path.is_relative_to(aside) for _, path in done.done)
    assert [problem.kind for problem in check(folder).bad] == ["class not in train"]
    source = FolderSource(folder / "train")
    assert all(decode(source.read(i)).size for i in range(len(source)))
    assert "class not in train" in {problem.kind for problem in done.bad}


@pytest.mark.slow
def test_exclude_accepts_other_kinds_and_another_destination(folder, tmp_path):
    done = exclude(check(folder), into=tmp_path / "twins", kinds={"duplicate", "train in val"})
    assert {str(path.relative_to(tmp_path / "twins")) for _, path in done.done} == {
        "train/cat/zz-copy.jpg",
        "val/cat/from-train.jpg",
        "val/dog/linked.jpg",
    }
    assert not {"duplicate", "train in val"} & set(check(folder).count())


def test_a_missing_path_is_an_error(tmp_path):
    with pytest.raises(DataError, match="there is no"):
        check(tmp_path / "missing")
