"""Synthetic photographs for tests: smooth colours, edges and a little noise."""

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TEST_PHOTOS = Path(__file__).parents[1] / "data" / "photos"
"""train/CLASS/*.jpg and val/CLASS/*.jpg, CC0."""

JPEG_LAYOUTS = list(itertools.product(["RGB", "L"], [0, 1, 2]))
"""(Pillow mode, chroma subsampling) of every kind of baseline JPEG that Pillow writes."""


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Height x width x 3, uint8: smoothly varying colours, a few sharp-edged discs, fine noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(rng.uniform(2, 14) * rows + rng.uniform(2, 14) * columns + rng.uniform(0, 6)) for _ in range(3)]
    pixels = 128 + 80 * np.stack(waves, axis=-1)
    for _ in range(4):
        disc = (rows - rng.uniform(0, 1)) ** 2 + (columns - rng.uniform(0, 1)) ** 2 < rng.uniform(0.01, 0.05)
        pixels[disc] = rng.uniform(0, 255, size=3)
    pixels += rng.normal(0, 4, size=(height, width, 1))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def encode(pixels: np.ndarray, format: str = "JPEG", *, mode: str = "RGB", **options: Any) -> bytes:
    """An image file's bytes; the pixels are first converted to Pillow's `mode`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def pillow_crop(data: bytes, box: tuple[int, int, int, int], size: tuple[int, int], channels: int) -> np.ndarray:
    """Reference for crops: decodes the whole image, cuts `box`, resizes with antialiasing."""
    top, left, height, width = box
    image = Image.open(io.BytesIO(data)).convert("RGB" if channels == 3 else "L")
    cut = image.crop((left, top, left + width, top + height)).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(cut, dtype=np.float64).reshape(*size, channels)
