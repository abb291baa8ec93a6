"""Thumbnails of the evaluated images that a model is most surely wrong about, for the report."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from megabatch.app.data import Source
from megabatch.data.jpeg.decode import decode
from megabatch.data.sources.arrays import ArraySource
from megabatch.errors import DataError
from megabatch.files import printable, write_text
from megabatch.train.evaluate import Mistake

THUMBNAIL_SIDE = 96
"""Longest side of a thumbnail, in pixels; smaller images are kept as they are."""


def write_mistakes(path: Path, source: Source, mistakes: Sequence[Mistake], where: Mapping[str, Any]) -> None:
    """Writes `where`, and each of `mistakes` with name, class names and thumbnail (a data URI), as JSON to `path`.

    Images that cannot be decoded, which evaluation replaced by others, are left out.
    """
    images = []
    for mistake in mistakes:
        try:
            thumbnail = _data_uri(_image(source, mistake.index))
        except (DataError, OSError):
            continue
        images.append(
            {
                "name": "/".join(image_name(source, mistake.index).split("/")[-2:]),  # reports are passed on
                "label": source.class_names[mistake.label],
                "predicted": source.class_names[mistake.predicted],
                "probability": round(mistake.probability, 4),
                "thumbnail": thumbnail,
            }
        )
    write_text(path, json.dumps({**where, "images": images}) + "\n")


def image_name(source: Source, index: int) -> str:
    """Name of an image: its path, or its number in a data set of arrays."""
    return f"image {index}" if isinstance(source, ArraySource) else printable(source.name(index))


def _image(source: Source, index: int) -> Image.Image:
    if isinstance(source, ArraySource):
        pixels = source.images[index].permute(1, 2, 0).cpu().numpy()
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return Image.fromarray(decode(source.read(index)))


def _data_uri(image: Image.Image) -> str:
    """Small images as PNG, without loss; others as JPEG of a few KB."""
    kind, options = ("PNG", {}) if max(image.size) <= THUMBNAIL_SIDE // 2 else ("JPEG", {"quality": 80})
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
