"""Checks on a sample of a data set's images: whether their colours and sizes suit the recipe."""

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from megabatch.app.data import Data, Source
from megabatch.data.jpeg.decode import decode_crop, image_size
from megabatch.data.sources.arrays import ArraySource
from megabatch.data.sources.protocol import EncodedSource
from megabatch.data.sources.remote import RemoteShards
from megabatch.errors import DataError
from megabatch.recipe import Recipe

_NUM_SAMPLED = 16
_NUM_SAMPLED_REMOTE = 4  # consecutive, so that one shard is downloaded
_THUMBNAIL = 64  # side in pixels at which colour is judged; resizing averages the noise of single pixels
_COLOUR = 32  # difference between channels, of 255, from which a pixel has a colour
_SMALL_RESOLUTION = 64
_MANY_TIMES = 4


@dataclass(frozen=True)
class _Image:
    name: str
    short_side: int  # pixels
    has_colour: bool


def refuse_colour_as_grey(recipe: Recipe, data: Data) -> None:
    """Raises DataError if the recipe reads images in grey and some of them are in colour, which training would drop."""
    if recipe.image_channels != 1:
        return
    for image in _sample(data.train):
        if image.has_colour:
            raise DataError(
                f"recipe {recipe.name} reads images in grey (image_channels=1), and {image.name} is in colour; recipe "
                "photos works, or --set image_channels=3 with three values of pixel_mean and pixel_std; "
                "--set image_channels=1 trains in grey"
            )


def image_remarks(recipe: Recipe, data: Data) -> list[str]:
    """Returns remarks on images that the recipe can train on, but was not made for; none on remote shards."""
    images = [] if isinstance(data.train, RemoteShards) else list(_sample(data.train))
    if not images:
        return []
    remarks = []
    if recipe.image_channels == 3 and not any(image.has_colour for image in images):
        remarks.append(
            "the images are grey and are read as three equal channels; --set image_channels=1 --set pixel_mean=0.5 "
            "--set pixel_std=0.25 reads one"
        )
    side, resolution = round(statistics.median(image.short_side for image in images)), recipe.eval_resolution
    if resolution <= _SMALL_RESOLUTION and side >= _MANY_TIMES * resolution and recipe.dataset != "folder":
        remarks.append(
            f"the images have about {side} px and are reduced to the {resolution} px of {recipe.dataset}, which drops "
            "their details; recipe photos works, or --set resolution=160 --set eval_resolution=160"
        )
    if resolution >= _MANY_TIMES * side:
        remarks.append(
            f"the images have about {side} px and are enlarged to {resolution} px, which takes time but adds no "
            f"detail; --set resolution={side} --set eval_resolution={side} works"
        )
    return remarks


def _sample(source: Source) -> Iterator[_Image]:
    """Images spread over `source`; none of an ArraySource, whose channels the loader checks."""
    if isinstance(source, ArraySource):
        return
    step = 1 if isinstance(source, RemoteShards) else max(1, len(source) // _NUM_SAMPLED)
    count = _NUM_SAMPLED_REMOTE if isinstance(source, RemoteShards) else _NUM_SAMPLED
    for index in range(0, len(source), step)[:count]:
        with contextlib.suppress(DataError, OSError):  # training replaces and counts what cannot be read
            yield _examine(source, index)


def _examine(source: EncodedSource, index: int) -> _Image:
    data = source.read(index)
    height, width = image_size(data)
    pixels = decode_crop(data, box=(0, 0, height, width), size=_THUMBNAIL).astype(int)
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    return _Image(source.name(index), min(height, width), bool(spread.max() >= _COLOUR))
