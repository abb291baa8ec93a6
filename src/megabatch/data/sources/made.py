"""Made photographs of ImageNet's shapes, to try a recipe without its data."""

import functools
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SHAPES = ((375, 500),) * 8 + ((500, 375),) * 3 + ((333, 500),) * 3 + ((400, 400), (900, 1200))
"""Height and width in pixels; most of ImageNet's photographs are 500 pixels wide and 375 or 333 high."""
NUM_DISTINCT = 64
"""JPEGs that are made; sample i has the bytes of JPEG i mod 64."""
_QUALITY = 92
_GRAIN = 12.0  # standard deviation of the noise in grey levels; it sets the number of bytes


class MadePhotos:
    """An encoded source of `count` samples in `num_classes` classes: JPEGs of smooth random colours with noise.

    Sizes in pixels and bytes are like ImageNet's, so that reading, decoding and cropping cost the same; there is
    nothing to learn. Labels are pseudorandom. The same arguments give the same samples on every worker.
    """

    shard_sizes: Sequence[int] | None = None

    def __init__(self, count: int, num_classes: int) -> None:
        self.labels: NDArray[np.int64] = np.random.default_rng(0).integers(num_classes, size=count)
        self.class_names = tuple(f"class{number:04d}" for number in range(num_classes))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        """Returns the JPEG of one sample."""
        return _photos()[index % NUM_DISTINCT]

    def name(self, index: int) -> str:
        """Returns the name of one sample."""
        return f"made photograph {index}"

    def describe(self) -> str:
        """Usual size and mean number of bytes, in words."""
        height, width = SHAPES[0]
        mean_kb = sum(map(len, _photos())) / NUM_DISTINCT / 1e3
        return f"made photographs, most of {width} x {height} pixels, {mean_kb:.0f} kB on average"


@functools.cache
def _photos() -> tuple[bytes, ...]:
    with ThreadPoolExecutor() as pool:
        return tuple(pool.map(_photo, range(NUM_DISTINCT)))


def _photo(number: int) -> bytes:
    generator = np.random.default_rng(number)
    height, width = SHAPES[number % len(SHAPES)]
    coarse = Image.fromarray(generator.integers(256, size=(6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = smooth + generator.normal(scale=_GRAIN, size=smooth.shape).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
