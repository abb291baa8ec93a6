"""Made photographs are decodable JPEGs of ImageNet's shapes, the same for every worker."""

import io

import numpy as np
from PIL import Image

from megabatch.data.sources.made import NUM_DISTINCT, SHAPES, MadePhotos
from megabatch.data.sources.protocol import EncodedSource


def test_made_photographs_are_jpegs_of_the_stated_shapes_and_size():
    source = MadePhotos(1000, 20)
    assert isinstance(source, EncodedSource)
    assert len(source) == 1000
    for index in range(len(SHAPES)):
        image = Image.open(io.BytesIO(source.read(index)))
        assert (image.height, image.width, image.format, image.mode) == (*SHAPES[index], "JPEG", "RGB")
        assert np.asarray(image).std() > 30
    mean = np.mean([len(source.read(index)) for index in range(NUM_DISTINCT)])
    assert 90e3 < mean < 130e3  # ImageNet's files have 110 kB on average
    assert f"{mean / 1e3:.0f} kB" in source.describe()
    assert source.read(3) == source.read(3 + NUM_DISTINCT) != source.read(4)


def test_labels_cover_the_classes_and_do_not_change():
    labels = MadePhotos(5000, 10).labels
    assert sorted(set(labels.tolist())) == list(range(10))
    assert np.array_equal(labels, MadePhotos(5000, 10).labels)
    assert len(MadePhotos(5, 10).class_names) == 10
