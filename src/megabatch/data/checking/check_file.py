"""What is wrong, or only odd, about the bytes of one image file."""

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image

from megabatch.data.jpeg.decode import MAX_PIXELS, decode, image_size
from megabatch.data.jpeg.formats import ENDINGS, sniff
from megabatch.errors import DataError


@dataclass(frozen=True)
class Kind:
    """A kind of problem. `is_bad`: training refuses the data set, or replaces the sample; else it only ought to be
    known."""

    is_bad: bool
    meaning: str


KINDS = {
    "empty": Kind(True, "the file has no bytes"),
    "not an image": Kind(True, "the bytes are of something else, such as a web page or a Git LFS pointer"),
    "unreadable": Kind(True, "the system does not let it be read"),
    "truncated": Kind(True, "the end of the image is missing"),
    "missing end": Kind(True, "all pixels are there, only the JPEG's end marker is not"),
    "damaged": Kind(True, "the image cannot be decoded whole"),
    "bomb": Kind(True, "absurdly many pixels, more than training decodes"),
    "link out": Kind(True, "a symbolic link that leads out of the data set"),
    "broken link": Kind(True, "a symbolic link to nothing"),
    "special file": Kind(True, "a pipe, socket or device that has an image's name"),
    "empty class": Kind(True, "a class without images"),
    "class in one part": Kind(True, "a class that only train has, or only val"),
    "refused archive": Kind(True, "a tar that is compressed, damaged, without labels or unsafe"),
    "wrong ending": Kind(False, "the name says another format than the bytes, such as a PNG called JPEG"),
    "CMYK": Kind(False, "four inks instead of three colours; colours shift a little when converted"),
    "16 bit": Kind(False, "more than 8 bits a channel; training keeps the upper 8"),
    "animated": Kind(False, "several frames or pages; training sees the first"),
    "transparent": Kind(False, "has an alpha channel, which training drops"),
    "rotated": Kind(False, "EXIF says to turn it; training does not, as ImageFolder does not"),
    "tiny": Kind(False, "a side of less than 16 pixels"),
    "elongated": Kind(False, "one side is more than ten times the other"),
    "blank": Kind(False, "every pixel has the same colour"),
    "stray bytes": Kind(False, "bytes between a JPEG's segments that belong to nothing"),
    "trailing bytes": Kind(False, "something follows the end of the image"),
    "duplicate": Kind(False, "the same bytes as another file of its class"),
    "two classes": Kind(False, "the same bytes are also in another class"),
    "train in val": Kind(False, "the same bytes are in train and in val"),
    "unknown ending": Kind(False, "not an ending of an image; the file is passed over"),
    "hidden": Kind(False, "a hidden file; it is passed over"),
    "no class": Kind(False, "an image that is in no class folder; it is passed over"),
    "odd name": Kind(False, "a name with control characters, or not in UTF-8"),
    "case clash": Kind(False, "names that differ in upper and lower case alone: one is lost on some systems"),
}

Finding = tuple[str, str]
"""(a key of `KINDS`, what was seen)"""

MIN_SIDE = 16
MAX_ASPECT = 10.0
_END = b"\xff\xd9"
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_LFS = b"version https://git-lfs"
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, Image.DecompressionBombError)


def inspect_image(data: bytes, ending: str | None, *, max_pixels: int = MAX_PIXELS) -> list[Finding]:
    """All that is bad or odd about an image file; `ending` is that of its name, without the dot, if it has a name."""
    if not data:
        return [("empty", "0 bytes")]
    kind = sniff(data)
    if kind is None:
        return [("not an image", _what_else(data))]
    fits = ending is None or ending.lower() in ENDINGS[kind]
    findings = [] if fits else [("wrong ending", f"a {kind} called .{ending}")]
    try:
        height, width = image_size(data, max_pixels=max_pixels)
        pixels = decode(data, max_pixels=max_pixels)
    except DataError as error:
        return [*findings, _why_unusable(data, kind, str(error))]
    findings += _odd_shape(height, width)
    findings += _odd_pixels(pixels)
    findings += _odd_jpeg(data) if kind == "jpeg" else []
    return findings + list(_odd_header(data))


def _what_else(data: bytes) -> str:
    start = data[:256].lstrip().lower()
    if start.startswith(_LFS):
        return "a Git LFS pointer; `git lfs pull` fetches the file it stands for"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<svg")):
        return "a web page or other markup"
    if not data.strip(b"\0"):
        return "nothing but zero bytes"
    return f"begins with {data[:12]!r}"


def _why_unusable(data: bytes, kind: str, error: str) -> Finding:
    if "absurdly large" in error:
        return "bomb", error
    if _is_cut_short(data, kind):
        if kind == "jpeg" and _decodes(data + _END):
            return "missing end", "the end marker is missing, and nothing else"
        return "truncated", error
    return "damaged", error


def _is_cut_short(data: bytes, kind: str) -> bool:
    ends: dict[str, Callable[[bytes], bool]] = {
        "jpeg": lambda data: jpeg_end(data) is not None,
        "png": lambda data: b"IEND" in data[-64:],
        "gif": lambda data: data.rstrip(b"\0").endswith(b";"),
        "webp": lambda data: len(data) >= int.from_bytes(data[4:8], "little") + 8,
        "bmp": lambda data: len(data) >= int.from_bytes(data[2:6], "little"),
    }
    return kind in ends and not ends[kind](data)


def _decodes(data: bytes) -> bool:
    try:
        decode(data)
    except DataError:
        return False
    return True


def jpeg_end(data: bytes) -> int | None:
    """Where the first image of a JPEG ends: one past its end marker. None if it has no end."""
    at = 2
    while (match := _NEXT_MARKER.search(data, at)) is not None:
        at = match.start()
        if data[at : at + 2] == _END:
            return at + 2
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        at += 2 + length
    return None


def _odd_shape(height: int, width: int) -> Iterator[Finding]:
    if min(height, width) < MIN_SIDE:
        yield "tiny", f"{width} x {height} pixels"
    if max(height, width) > MAX_ASPECT * min(height, width):
        yield "elongated", f"{width} x {height} pixels"


def _odd_pixels(pixels: npt.NDArray[np.uint8]) -> Iterator[Finding]:
    first = pixels[0, 0]
    if (pixels == first).all():
        yield "blank", f"all pixels are {tuple(int(value) for value in first)}"


def _odd_jpeg(data: bytes) -> Iterator[Finding]:
    end = jpeg_end(data)
    if end is not None and data[end:].strip(b"\0"):
        yield "trailing bytes", f"{len(data) - end} bytes after the end"
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
    except _PILLOW_ERRORS:  # the pixels were decoded all the same
        return


def _odd_mode(image: Image.Image, data: bytes) -> Iterator[Finding]:
    if image.mode == "CMYK":
        yield "CMYK", "four channels"
    if image.mode[0] in "IF" or (sniff(data) == "png" and data[24] == 16):
        yield "16 bit", f"mode {image.mode}"
    if getattr(image, "n_frames", 1) > 1:
        yield "animated", f"{getattr(image, 'n_frames', 1)} frames"
    if (image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info) and _see_through(image):
        yield "transparent", f"mode {image.mode}"
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in range(2, 9):
        yield "rotated", f"EXIF orientation {orientation}"


def _see_through(image: Image.Image) -> bool:
    lowest = image.convert("RGBA").getchannel("A").getextrema()[0]
    return bool(np.less(lowest, 255))
