import pytest
import torch

from megabatch.data.sources.arrays import ArraySource
from megabatch.errors import DataError

IMAGES = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 1, 0])


def test_a_source_knows_its_length_device_and_classes():
    source = ArraySource(IMAGES, LABELS, ("cat", "dog"))
    assert len(source) == 4
    assert source.device == torch.device("cpu")
    assert source.to("cpu").images is IMAGES


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (IMAGES.float(), LABELS, ("a", "b"), "images are float32.*uint8 of shape"),
        (IMAGES[:, 0], LABELS, ("a", "b"), r"shape \[4, 8, 8\].*\[n, channels, height, width\]"),
        (IMAGES, LABELS[:3], ("a", "b"), r"labels are int64 of shape \[3\]; int64 of shape \[4\]"),
        (IMAGES, LABELS.int(), ("a", "b"), "labels are int32"),
        (IMAGES[:0], LABELS[:0], ("a", "b"), "holds no images"),
        (IMAGES, LABELS, ("a",), r"labels are in 0\.\.1, class names cover 0\.\.0"),
        (IMAGES, LABELS - 1, ("a", "b"), r"labels are in -1\.\.0"),
    ],
)
def test_arrays_of_another_dtype_or_shape_are_refused_with_what_is_needed(images, labels, names, message):
    with pytest.raises(DataError, match=message):
        ArraySource(images, labels, names)
