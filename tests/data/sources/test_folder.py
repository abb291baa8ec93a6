import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from photographs import TEST_PHOTOS, encode, photograph
from PIL import Image

from megabatch.data.checking.check import check
from megabatch.data.jpeg.decode import decode, image_size
from megabatch.data.jpeg.formats import ENDINGS
from megabatch.data.sources.dataset import open_folder
from megabatch.data.sources.folder import FolderSource
from megabatch.data.sources.protocol import EncodedSource
from megabatch.data.sources.tar.shards import ShardSource
from megabatch.errors import DataError

PHOTOS = TEST_PHOTOS
JPEG = (PHOTOS / "train" / "hat" / "004.jpg").read_bytes()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A copy of the photographs that a test may damage."""
    shutil.copytree(PHOTOS, tmp_path / "photos")
    return tmp_path / "photos"


def test_the_photographs_open_as_six_classes_in_order_of_name():
    train, val = open_folder(PHOTOS)
    assert train.class_names == val.class_names == ("dress", "hat", "pants", "shirt", "shoes", "t-shirt")
    assert train.labels.tolist() == np.repeat(range(6), 4).tolist()
    assert len(val) == 12
    assert train.name(4).endswith("train/hat/004.jpg")
    assert train.read(4) == JPEG
    assert isinstance(train, EncodedSource)
    assert train.shard_sizes is None
    train.probe()


def test_images_count_by_suffix_in_any_case_at_any_depth_and_hidden_files_do_not(tmp_path):
    names = ["b.JPG", "a.jpeg", "sub/c.PnG", "d.webp", ".hidden.jpg", "notes.txt", "sub/.DS_Store", "ä ö.bmp"]
    for name in names:
        (tmp_path / "cat" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cat" / name).write_bytes(b"x")
    (tmp_path / ".git").mkdir()
    source = FolderSource(tmp_path)
    found = [Path(source.name(i)).relative_to(tmp_path / "cat").as_posix() for i in range(len(source))]
    assert found == ["a.jpeg", "b.JPG", "d.webp", "sub/c.PnG", "ä ö.bmp"]


def test_order_is_by_name_not_by_creation(tmp_path):
    for name in ("zebra", "Ape", "ant"):
        for number in (10, 2, 1):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{number}.jpg").write_bytes(b"x")
    source = FolderSource(tmp_path)
    assert source.class_names == ("Ape", "ant", "zebra")
    assert [Path(source.name(i)).name for i in range(3)] == ["1.jpg", "10.jpg", "2.jpg"]


def test_a_missing_folder_is_an_error_that_states_what_is_needed(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*nowhere; needed: train/CLASS"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is not a folder; needed: a folder with one folder of images per class"):
        FolderSource(tmp_path / "nowhere")


def test_the_folder_that_has_train_and_val_is_suggested(tmp_path, photos):
    with pytest.raises(DataError, match=r"has no folder train/, but .*photos has; did you mean .*photos\?"):
        open_folder(tmp_path)
    shutil.rmtree(photos / "val")
    with pytest.raises(DataError, match=r"no images for 'val', only for train; needed: val/CLASS"):
        open_folder(photos)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "readme.txt").write_text("none")
    with pytest.raises(DataError, match=r"contains no images; needed: files that end in .*\.jpeg, \.jpg"):
        FolderSource(tmp_path)
    with pytest.raises(DataError, match="one folder of image files per class"):
        FolderSource(tmp_path / "cat")


def test_a_folder_that_cannot_be_read_is_named(photos, monkeypatch):
    import os

    scan = os.scandir

    def refuse(path):
        if str(path).endswith("hat"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for use in (open_folder, lambda path: FolderSource(path / "train")):
        with pytest.raises(DataError, match=r"hat cannot be read \(Permission denied\); needed: permission to read"):
            use(photos)


def test_an_empty_class_is_named(photos):
    for file in (photos / "train" / "pants").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="class 'pants' has no images in"):
        open_folder(photos)


def test_classes_that_differ_between_train_and_val_are_named(photos):
    shutil.copytree(photos / "val" / "hat", photos / "val" / "hats")
    with pytest.raises(DataError, match=r"'hats' is only in val \(6 and 7 classes\)"):
        open_folder(photos)


def test_a_link_out_of_the_data_set_is_refused_and_one_inside_counts_as_a_file(photos, tmp_path):
    inside = photos / "train" / "hat" / "again.jpg"
    inside.symlink_to(photos / "train" / "dress" / "009.jpg")
    assert len(FolderSource(photos / "train")) == 25
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(JPEG)
    (photos / "train" / "hat" / "out.jpg").symlink_to(secret)
    with pytest.raises(DataError, match=r"out\.jpg is a symbolic link out of the data set"):
        FolderSource(photos / "train")


@pytest.mark.parametrize("place", ["train/gloves", "train/hat/more"])
def test_a_linked_folder_that_leaves_the_data_set_is_refused(photos, tmp_path, place):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.jpg").write_bytes(JPEG)
    (photos / place).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="symbolic link out of the data set"):
        FolderSource(photos / "train")


def test_the_data_set_itself_may_be_a_link(photos, tmp_path):
    (tmp_path / "link").symlink_to(photos)
    assert len(open_folder(tmp_path / "link")[0]) == 24


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("zero.jpg", b"", "the file is empty"),
        ("cut.jpg", JPEG[:-2000], "the JPEG is truncated"),
        ("text.jpg", b"<html>not found</html>" * 99, "not an image"),
        ("cut.png", encode(photograph(80, 90), "PNG")[:-2000], "the PNG is truncated"),
        ("cut.webp", encode(photograph(80, 90), "WEBP")[:-200], "the WebP is truncated"),
    ],
)
def test_probe_names_the_bad_file_and_its_fault(photos, name, content, fault):
    (photos / "train" / "hat" / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"hat/{name}: {fault}.*megabatch data check"):
        FolderSource(photos / "train").probe()


def test_probe_counts_the_bad_files_and_names_the_first(photos):
    for name in ("dress/028.jpg", "hat/007.jpg", "shoes/041.jpg"):
        (photos / "train" / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"dress/028\.jpg: the file is empty \(0 bytes\) and 2 more files are bad"):
        FolderSource(photos / "train").probe()


def test_probe_of_a_sample_checks_that_many_files_spread_evenly(photos, monkeypatch):
    source = FolderSource(photos / "train")
    checked = []
    monkeypatch.setattr(source, "_fault", checked.append)
    source.probe(sample=5)
    assert sorted(checked) == [0, 5, 11, 17, 23]
    checked.clear()
    source.probe(sample=1000)
    assert sorted(checked) == list(range(24))


def test_a_file_that_cannot_be_read_is_named(photos):
    source = FolderSource(photos / "train")
    (photos / "train" / "hat" / "004.jpg").unlink()
    with pytest.raises(DataError, match=r"hat/004\.jpg: cannot be read \(No such file"):
        source.probe()


@pytest.mark.parametrize("ending", sorted(ending for endings in ENDINGS.values() for ending in endings))
def test_every_ending_of_a_known_format_is_that_of_an_image(tmp_path, ending):
    for name in (f"a.{ending}", f"b.{ending.upper()}"):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / name).write_bytes(b"x")
    assert len(FolderSource(tmp_path)) == 2
    with tarfile.open(tmp_path / "one.tar", "w") as archive:
        archive.add(tmp_path / "cat" / f"a.{ending}", f"a.{ending}")
        (tmp_path / "a.cls").write_text("0")
        archive.add(tmp_path / "a.cls", "a.cls")
    assert len(ShardSource(tmp_path / "one.tar")) == 1


def test_a_photo_without_an_installed_reader_is_refused_with_the_package_that_reads_it(photos, monkeypatch):
    monkeypatch.setattr("megabatch.data.jpeg.decode._register_heic", lambda: None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    photo = photos / "train" / "hat" / "IMG_0001.HEIC"
    photo.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(DataError, match=r"IMG_0001.HEIC: .*'megabatch\[heic\]'.*--exclude"):
        FolderSource(photos / "train").probe()
    assert check(photos).count() == {"no reader": 1}


def test_heic_photos_are_read_where_pillow_heif_is_installed():
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels, file = photograph(48, 64, seed=1), io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(file, quality=95)
    assert np.abs(decode(file.getvalue()).astype(int) - pixels).mean() < 4
    assert image_size(file.getvalue()) == (48, 64)
