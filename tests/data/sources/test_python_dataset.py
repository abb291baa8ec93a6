"""`--data FILE.py:FUNCTION`: map-style data sets of the user."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megabatch.data.jpeg.decode import decode
from megabatch.data.sources.protocol import EncodedSource
from megabatch.data.sources.python_dataset import PythonSource, open_python
from megabatch.errors import DataError

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


class Listed(list):
    """A list of (image, label) as a data set."""


@pytest.mark.parametrize(
    ("image", "pixels"),
    [
        (png(PIXELS), PIXELS),
        (Image.fromarray(PIXELS), PIXELS),
        (PIXELS, PIXELS),
        (torch.from_numpy(PIXELS).permute(2, 0, 1), PIXELS),
        (PIXELS[:, :, 0], np.repeat(PIXELS[:, :, :1], 3, axis=2)),
        (torch.from_numpy(PIXELS[None, :, :, 0]), np.repeat(PIXELS[:, :, :1], 3, axis=2)),
    ],
    ids=["bytes", "pillow", "array", "tensor", "grey array", "grey tensor"],
)
def test_an_image_of_any_form_keeps_its_pixels(image, pixels):
    source = PythonSource(Listed([(image, 0), (image, 1)]), "mine")
    assert isinstance(source, EncodedSource)
    assert np.array_equal(decode(source.read(0), channels=3), pixels)


def test_a_path_is_read(tmp_path):
    (tmp_path / "0.png").write_bytes(png(PIXELS))
    assert PythonSource(Listed([(tmp_path / "0.png", "cat")]), "mine").read(0) == png(PIXELS)


def test_labels_are_numbers_names_or_tensors_and_classes_may_be_named():
    assert PythonSource(Listed([(PIXELS, "dog"), (PIXELS, "cat")]), "mine").class_names == ("cat", "dog")
    source = PythonSource(Listed([(PIXELS, torch.tensor(1)), (PIXELS, np.int64(0))]), "mine")
    assert source.labels.tolist() == [1, 0]
    named = Listed([(PIXELS, 1), (PIXELS, 0)])
    named.classes = ["cat", "dog"]
    assert PythonSource(named, "mine").class_names == ("cat", "dog")


def test_targets_spare_the_reading_of_every_sample():
    class Lazy:
        targets = (0, 1, 1)

        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise AssertionError("a sample was read")

    source = PythonSource(Lazy(), "mine")
    assert source.labels.tolist() == [0, 1, 1]
    with pytest.raises(DataError, match=r"mine\[2\]: AssertionError: a sample was read"):
        source.read(2)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def data(part): return 3", "'train' gave int, needed: a data set with len"),
        ("def data(part): return []", "0 samples and 0 labels"),
        ("def data(part): return 1 / 0", "'train' raised ZeroDivisionError"),
        ("def data(part): return [(b'', -1)]", "label -1 is not a class"),
    ],
)
def test_a_function_that_gives_no_data_set_is_refused(tmp_path, code, said):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(DataError, match=said):
        open_python(f"{tmp_path / 'mine.py'}:data")
