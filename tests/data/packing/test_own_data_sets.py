"""`data check` and `data pack` of FILE.py:FUNCTION."""

import numpy as np
import pytest

from megabatch.data.checking.check import check
from megabatch.data.jpeg.decode import decode
from megabatch.data.packing.pack import pack
from megabatch.data.sources.dataset import open_shards
from megabatch.errors import DataError

SETS = """
import numpy as np

class Pixels:
    classes = ("cat", "dog")

    def __init__(self, seed, count):
        self.images = np.random.default_rng(seed).integers(0, 256, (count, 40, 48, 3), dtype=np.uint8)
        self.targets = [index % 2 for index in range(count)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if index == 7:
            raise OSError("no such picture")
        return self.images[index], self.targets[index]

def photos(part):
    return Pixels(SEED, 12) if part == "train" else Pixels(1, 4)

def none(part):
    return None
"""


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "sets.py").write_text(SETS.replace("SEED", "0"))
    return tmp_path / "sets.py:photos"


def test_check_names_the_unreadable_sample_of_a_function(photos):
    report = check(photos)
    assert (report.num_images, [(p.name, p.kind) for p in report.problems]) == (
        16,
        [("sets.py:photos train[7]", "unreadable")],
    )


def test_pack_stores_the_pixels_classes_and_parts_of_a_function(photos, tmp_path):
    report = pack(photos, tmp_path / "packed", skip_bad=True)
    assert (report.num_samples, report.class_names) == ({"train": 11, "val": 4}, ("cat", "dog"))
    train, _ = open_shards(tmp_path / "packed")
    expected = np.random.default_rng(0).integers(0, 256, (12, 40, 48, 3), dtype=np.uint8)
    indices = [int(train.name(i).rsplit("/", 1)[1].split("-")[0]) for i in range(len(train))]
    assert sorted(indices) == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    for i, index in enumerate(indices):
        np.testing.assert_array_equal(decode(train.read(i)), expected[index])
        assert train.labels[i] == index % 2


def test_shards_of_other_samples_are_not_kept(photos, tmp_path):
    pack(photos, tmp_path / "packed", skip_bad=True)
    assert pack(photos, tmp_path / "packed", skip_bad=True).num_kept_shards == 2
    (tmp_path / "sets.py").write_text(SETS.replace("SEED", "5"))  # images of the same size
    assert pack(photos, tmp_path / "packed", skip_bad=True).num_kept_shards == 1  # val


def test_a_bad_sample_or_no_data_set_is_refused(photos, tmp_path):
    with pytest.raises(DataError, match="no such picture"):
        pack(photos, tmp_path / "packed")
    with pytest.raises(DataError, match="'train' gave None"):
        pack(str(photos).replace("photos", "none"), tmp_path / "packed")
