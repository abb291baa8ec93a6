"""Checks the bytes of one image file: bad ones, which training cannot use, and odd ones, which it can."""

import io
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image

from megabatch.data.jpeg.decode import MAX_PIXELS, PILLOW_ERRORS, decode, image_size
from megabatch.data.jpeg.ends import image_end
from megabatch.data.jpeg.formats import ENDINGS, sniff
from megabatch.errors import DataError, NoDecoderError, TooManyPixelsError

BAD_KINDS = frozenset(
    {
        "empty",  # the file has 0 bytes
        "not an image",  # the content is something else, such as a web page or a Git LFS pointer
        "unreadable",  # the operating system denies reading it
        "truncated",  # the end of the image is missing
        "missing end",  # only the JPEG's end marker is missing; all pixels are present
        "no reader",  # no installed package reads the format, as HEIC without pillow-heif
        "damaged",  # the image cannot be decoded completely
        "bomb",  # a decompression bomb: more pixels than training decodes
        "link out",  # a symbolic link to a place outside the data set
        "broken link",  # a symbolic link whose target does not exist
        "special file",  # a pipe, socket or device with an image's name
        "empty class",  # a class without images
        "class not in train",  # a class that only val or test has
        "refused archive",  # a tar that is compressed, damaged, without labels or unsafe
        "refused data set",  # files that are good by themselves, but do not go together
    }
)
"""Problems for which training rejects the data set or replaces the sample."""

ODD_KINDS = frozenset(
    {
        "wrong ending",  # the extension is that of another format, such as a PNG named .jpg
        "CMYK",  # four inks instead of three colours; colours shift slightly when converted
        "16 bit",  # more than 8 bits per channel; training keeps the upper 8
        "animated",  # several frames or pages; training uses the first
        "transparent",  # has an alpha channel, which training drops
        "rotated",  # has an EXIF orientation, which training ignores, as ImageFolder does
        "tiny",  # a side of less than 16 pixels
        "elongated",  # one side is more than ten times the other
        "blank",  # all pixels have the same colour
        "stray bytes",  # bytes between a JPEG's segments that belong to none of them
        "trailing bytes",  # data after the end of the image
        "duplicate",  # same bytes as another file of its class
        "two classes",  # same bytes as a file of another class
        "train in val",  # same bytes in train and in val
        "class in train alone",  # a class that val or test lacks
        "not read",  # an archive or table beside the data set
        "unknown ending",  # not an image's extension; the file is skipped
        "hidden",  # a hidden file; skipped
        "no class",  # an image outside of all class folders; skipped
        "odd name",  # a name with control characters or invalid UTF-8
        "case clash",  # differs from another name only in case: some file systems keep only one of them
    }
)
"""Problems that training tolerates but the user should know about."""

KINDS = BAD_KINDS | ODD_KINDS

Finding = tuple[str, str]
"""(one of `KINDS`, detail)"""

MIN_SIDE = 16
MAX_ASPECT = 10.0
_END = b"\xff\xd9"
_LFS = b"version https://git-lfs"


def inspect_image(data: bytes, ending: str | None, *, max_pixels: int = MAX_PIXELS) -> list[Finding]:
    """All bad and odd properties of an image file.

    `ending` is the file name's extension without the dot, or None if the image has no file name.
    """
    if not data:
        return [("empty", "0 bytes")]
    format_name = sniff(data)
    if format_name is None:
        return [("not an image", _describe_non_image(data))]
    fits = ending is None or ending.lower() in ENDINGS[format_name]
    findings = [] if fits else [("wrong ending", f"a {format_name} named .{ending}")]
    try:
        height, width = image_size(data, max_pixels=max_pixels)
        pixels = decode(data, max_pixels=max_pixels)
    except DataError as error:
        return [*findings, _classify_error(data, format_name, error)]
    findings += _odd_shape(height, width)
    findings += _odd_pixels(pixels)
    findings += _odd_end(data)
    findings += _odd_jpeg(data) if format_name == "jpeg" else []
    return findings + list(_odd_header(data))


def _describe_non_image(data: bytes) -> str:
    start = data[:256].lstrip().lower()
    if start.startswith(_LFS):
        return "a Git LFS pointer; `git lfs pull` fetches the file"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<svg")):
        return "a web page or other markup"
    if not data.strip(b"\0"):
        return "zero bytes only"
    return f"begins with {data[:12]!r}"


def _classify_error(data: bytes, format_name: str, error: DataError) -> Finding:
    if isinstance(error, TooManyPixelsError):
        return "bomb", str(error)
    if isinstance(error, NoDecoderError):
        return "no reader", str(error)
    if image_end(data) is not None:
        return "damaged", str(error)
    if format_name == "jpeg" and _decodes(data + _END) and not list(_odd_jpeg(data + _END)):
        return "missing end", "only the end marker is missing"
    return "truncated", str(error)


def _decodes(data: bytes) -> bool:
    try:
        decode(data)
    except DataError:
        return False
    return True


def _odd_shape(height: int, width: int) -> Iterator[Finding]:
    if min(height, width) < MIN_SIDE:
        yield "tiny", f"{width} x {height} pixels"
    if max(height, width) > MAX_ASPECT * min(height, width):
        yield "elongated", f"{width} x {height} pixels"


def _odd_pixels(pixels: npt.NDArray[np.uint8]) -> Iterator[Finding]:
    first = pixels[0, 0]
    if (pixels == first).all():
        yield "blank", f"all pixels are {tuple(int(value) for value in first)}"


def _odd_end(data: bytes) -> Iterator[Finding]:
    end = image_end(data)
    if end is not None and end < len(data):
        yield "trailing bytes", f"{len(data) - end} bytes after the end"


def _odd_jpeg(data: bytes) -> Iterator[Finding]:
    try:
        simplejpeg.decode_jpeg_header(data)
        simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8)
    except (ValueError, KeyError) as error:
        if "extraneous" in str(error):
            yield "stray bytes", str(error)


def _odd_header(data: bytes) -> Iterator[Finding]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            yield from _odd_mode(image, data)
    except PILLOW_ERRORS:  # the pixels were decoded, so the file is usable
        return


def _odd_mode(image: Image.Image, data: bytes) -> Iterator[Finding]:
    if image.mode == "CMYK":
        yield "CMYK", "four channels"
    if image.mode[0] in "IF" or (sniff(data) == "png" and data[24] == 16):
        yield "16 bit", f"mode {image.mode}"
    if getattr(image, "n_frames", 1) > 1:
        yield "animated", f"{getattr(image, 'n_frames', 1)} frames"
    if (image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info) and _has_transparent_pixels(image):
        yield "transparent", f"mode {image.mode}"
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in range(2, 9):
        yield "rotated", f"EXIF orientation {orientation}"


def _has_transparent_pixels(image: Image.Image) -> bool:
    lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
    return bool(np.less(lowest, 255))
