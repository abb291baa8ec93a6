"""Mutated image files of every format that the installed Pillow writes: pixels, or DataError."""

import io

import numpy as np
import pytest
from mutations import mutate_bytes, run_cases
from photographs import photograph
from PIL import Image
from slow import slow_except

from megabatch.data.checking.check_file import KINDS, inspect_image
from megabatch.data.jpeg.decode import decode, decode_crop, image_size
from megabatch.data.jpeg.ends import image_end

OPTIONS = {
    "jpeg": [("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"subsampling": 0, "restart_marker_blocks": 2})],
    "png": [("PNG", {}), ("PNG", {"mode": "P"}), ("PNG", {"mode": "I;16"}), ("PNG", {"mode": "1"})],
    "gif": [("GIF", {"mode": "P"})],
    "webp": [("WEBP", {}), ("WEBP", {"lossless": True})],
    "bmp": [("BMP", {}), ("BMP", {"mode": "P"})],
    "tiff": [
        ("TIFF", {}),
        *[("TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")],
    ],
    "pnm": [("PPM", {}), ("PPM", {"mode": "L"}), ("PPM", {"mode": "1"})],
    "jp2": [("JPEG2000", {}), ("JPEG2000", {"no_jp2": True})],
    "avif": [("AVIF", {})],
}
MAX_PIXELS = 1 << 22


def seeds(kind: str) -> list[bytes]:
    """Small files of one format, in its usual variants."""
    files = []
    for number, (name, options) in enumerate(OPTIONS[kind]):
        mode, arguments = options.get("mode", "RGB"), {key: value for key, value in options.items() if key != "mode"}
        pixels = photograph(40, 52, number)
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels)
        buffer = io.BytesIO()
        (image if mode == "I;16" else image.convert(mode)).save(buffer, name, **arguments)
        files.append(buffer.getvalue())
    return files


def use(data: bytes, rng) -> bool:
    """Does with a file what training and `data check` do."""
    end = image_end(data)
    assert end is None or 0 <= end <= len(data)
    assert {kind for kind, _ in inspect_image(data, "jpg", max_pixels=MAX_PIXELS)} <= KINDS
    height, width = image_size(data, max_pixels=MAX_PIXELS)
    box = (height // 4, width // 4, max(1, height // 2), max(1, width // 2))
    channels = rng.choice([1, 3])
    assert decode_crop(data, box=box, size=24, channels=channels, max_pixels=MAX_PIXELS).shape == (24, 24, channels)
    return decode(data, channels=channels, max_pixels=MAX_PIXELS).shape == (height, width, channels)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged metadata and then decodes the image
@pytest.mark.parametrize("count", slow_except([60, 3000], 60))
@pytest.mark.parametrize("kind", OPTIONS)
def test_mutated_images(kind, count):
    files = seeds(kind)

    def case(rng):
        data = rng.choice(files)
        return use(data if rng.random() < 0.1 else mutate_bytes(data, rng), rng)

    outcomes = run_cases(f"images: {kind}", count, case)
    assert min(outcomes["accepted"], outcomes["refused"]) > 0
