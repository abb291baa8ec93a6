"""Images whose colours or sizes do not suit a recipe are refused or remarked on."""

import dataclasses
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megabatch import recipes
from megabatch.app.data import Data
from megabatch.app.image_checks import image_remarks, refuse_colour_as_grey
from megabatch.data.sources.arrays import ArraySource
from megabatch.data.sources.remote import RemoteShards
from megabatch.errors import DataError
from megabatch.recipe import override

GREY, BLUE = (90, 90, 90), (20, 40, 200)


class Files:
    """A source of image files in memory that counts what is read."""

    def __init__(self, files):
        self.files, self.num_read = files, 0

    def __len__(self):
        return len(self.files)

    def read(self, index):
        self.num_read += 1
        return self.files[index]

    def name(self, index):
        return f"image {index}"


def photo(color=BLUE, size=(40, 30), kind="JPEG"):
    """A picture of one colour, with noise in its brightness."""
    noise = np.random.default_rng(0).integers(-10, 10, (size[1], size[0], 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def data_of(*files):
    source = Files(files)
    return Data(source, source, "made")


GREY_RECIPE = recipes.get("fashion_mnist")


def test_colour_images_are_refused_by_a_recipe_that_reads_grey():
    said = r"fashion_mnist reads images in grey \(image_channels=1\), and image 2 is in colour; recipe photos works"
    with pytest.raises(DataError, match=said):
        refuse_colour_as_grey(GREY_RECIPE, data_of(photo(GREY), photo(GREY), photo(BLUE)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_grey_images_stored_in_three_channels_are_grey(kind):
    refuse_colour_as_grey(GREY_RECIPE, data_of(photo(GREY, kind=kind)))


def test_a_recipe_that_reads_colour_accepts_colour_and_pixels_in_memory_are_left_to_the_loader():
    data = data_of(photo(BLUE))
    refuse_colour_as_grey(recipes.get("photos"), data)
    assert data.train.num_read == 0
    pixels = ArraySource(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("a",))
    refuse_colour_as_grey(GREY_RECIPE, Data(pixels, pixels, "made"))


def test_a_sample_is_spread_over_the_data_and_skips_what_cannot_be_read():
    files = [photo(GREY)] * 1000 + [photo(BLUE)] * 100
    data = data_of(*files)
    with pytest.raises(DataError, match="image 10"):
        refuse_colour_as_grey(GREY_RECIPE, data)
    assert data.train.num_read <= 16
    refuse_colour_as_grey(GREY_RECIPE, data_of(b"damaged", photo(GREY)))


def test_of_remote_shards_few_neighbours_are_read_and_only_by_a_recipe_that_reads_grey(monkeypatch):
    read = []
    monkeypatch.setattr(RemoteShards, "read", lambda _, index: read.append(index) or photo(GREY))
    monkeypatch.setattr(RemoteShards, "__len__", lambda _: 1000)
    monkeypatch.setattr(RemoteShards, "name", lambda _, index: f"image {index}")
    remote = RemoteShards.__new__(RemoteShards)
    data = Data(remote, remote, "made")
    assert image_remarks(recipes.get("photos"), data) == []
    assert read == []
    refuse_colour_as_grey(GREY_RECIPE, data)
    assert read == [0, 1, 2, 3]


def settings_in(remark):
    return dict(re.findall(r"--set (\w+)=(\S+)", remark))


def test_grey_images_in_a_colour_recipe_are_remarked_on_with_settings_that_work():
    recipe = recipes.get("photos")
    (remark,) = image_remarks(recipe, data_of(photo(GREY, (300, 200))))
    assert "three equal channels" in remark
    assert override(recipe, settings_in(remark)).image_channels == 1
    assert image_remarks(recipe, data_of(photo(GREY, (300, 200)), photo(BLUE, (300, 200)))) == []


@pytest.mark.parametrize(
    ("name", "changes", "size", "said"),
    [
        ("fashion_mnist", {"image_channels": 3}, (640, 480), "about 480 px and are reduced to the 28 px"),
        ("cifar10", {}, (640, 480), "about 480 px and are reduced to the 32 px of cifar10"),
        ("cifar10", {}, (120, 100), None),
        ("photos", {"eval_resolution": 32}, (640, 480), None),
        ("mlperf_4096", {}, (4000, 3000), None),
        ("photos", {}, (32, 28), "about 28 px and are enlarged to 160 px"),
        ("photos", {}, (60, 50), None),
    ],
)
def test_images_much_larger_or_smaller_than_the_recipes_are_remarked_on(name, changes, size, said):
    recipe = dataclasses.replace(recipes.get(name), **changes)
    remarks = image_remarks(recipe, data_of(photo(BLUE, size)))
    assert len(remarks) == (said is not None)
    if said:
        assert said in remarks[0]
        settings = settings_in(remarks[0])
        works = SimpleNamespace(**{key: int(value) for key, value in settings.items()})
        assert works.resolution == works.eval_resolution
        fitting = dataclasses.replace(recipe, eval_resolution=works.eval_resolution)
        assert image_remarks(fitting, data_of(photo(BLUE, size))) == []
