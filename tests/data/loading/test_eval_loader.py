import numpy as np
import pytest
import torch
from photographs import TEST_PHOTOS
from PIL import Image

from megabatch import ArraySource, EvalLoader
from megabatch.data.sources.folder import FolderSource

PHOTOS = FolderSource(TEST_PHOTOS / "val")
PLAIN = {"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (1 / 255, 1 / 255, 1 / 255)}  # pixels stay in 0..255


def color_arrays(size: int) -> ArraySource:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (11, 3, size, size), dtype=torch.uint8, generator=generator)
    return ArraySource(images, torch.arange(11), tuple(map(str, range(11))))


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_batches_cover_the_range_once_in_index_order(batch_size):
    loader = EvalLoader(color_arrays(8), resolution=8, **PLAIN)
    assert loader.num_samples == 11
    batches = list(loader.batches(2, 9, batch_size))
    assert torch.cat([batch.labels for batch in batches]).tolist() == list(range(2, 9))
    assert all(batch.count == batch_size for batch in batches[:-1])


def test_arrays_of_the_resolution_are_used_whole():
    source = color_arrays(8)
    batch = EvalLoader(source, resolution=8, crop_ratio=0.5, **PLAIN).load(range(11))
    torch.testing.assert_close(batch.images, source.images.float(), rtol=1e-6, atol=1e-4)


def test_arrays_of_another_size_are_cropped_at_the_centre_and_resized():
    source = color_arrays(16)
    batch = EvalLoader(source, resolution=8, crop_ratio=0.5, **PLAIN).load(range(11))
    torch.testing.assert_close(batch.images, source.images[:, :, 4:12, 4:12].float(), rtol=1e-6, atol=1e-4)


def test_photographs_are_resized_by_the_shorter_side_and_cropped_at_the_centre():
    batch = EvalLoader(PHOTOS, resolution=224, crop_ratio=0.875, **PLAIN).load(range(len(PHOTOS)))
    for i in range(len(PHOTOS)):
        image = Image.open(PHOTOS.name(i)).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - 224) / 2, (image.height - 224) / 2
        expected = np.asarray(image.crop((int(left), int(top), int(left) + 224, int(top) + 224)), dtype=np.float32)
        difference = np.abs(batch.images[i].permute(1, 2, 0).numpy() - expected)
        assert difference.mean() < 4
        assert batch.labels[i] == PHOTOS.labels[i]


def test_a_grey_recipe_reads_colour_photographs_as_grey():
    batch = EvalLoader(PHOTOS, resolution=32, pixel_mean=(0.5,), pixel_std=(0.5,), image_channels=1).load(range(3))
    assert batch.images.shape == (3, 1, 32, 32)
