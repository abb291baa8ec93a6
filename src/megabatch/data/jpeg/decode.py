"""Decodes image files to uint8 pixels, and only as much of a file as a crop needs.

Every function takes the file's bytes; pixels are height x width x channels, RGB or grey. libjpeg-turbo decodes plain
JPEG, Pillow the other formats that `sniff` recognises. Of an animation the first frame is used, transparency is
dropped, 16 bits are reduced to 8, CMYK is converted to RGB. EXIF orientation is ignored, as in torchvision's
ImageFolder, because most training sets were labelled and evaluated that way.

A file that cannot be decoded completely raises `DataError` with the reason; no function returns part of an image.
Damage inside a JPEG below the crop's last row may go undetected, because those rows are not decoded; a missing end
marker is always detected. Bytes after the image's end are ignored.

`decode_crop` uses the compiled decoder of `library.py` if it is built and the file is a plain baseline JPEG. All
functions are thread-safe and spend most of their time without the GIL.
"""

import contextlib
import functools
import io
import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError

from megabatch.data.jpeg import library
from megabatch.data.jpeg.formats import PILLOW_NAMES, sniff
from megabatch.errors import DataError, NoDecoderError, TooManyPixelsError

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
FloatBox = tuple[float, float, float, float]

MAX_PIXELS = 89_478_485  # Pillow's default limit: 256 MiB of RGB; the largest image of ImageNet has 61 million
PILLOW_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError, TypeError, RuntimeError),
    *(struct.error, Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""What Pillow raises for damaged files."""

_JPEG_START = b"\xff\xd8\xff"
_SMALL = 64 * 64  # largest box, in pixels, that is always decoded at full resolution, as in csrc/crop.c
_PLAIN_COLOURS = frozenset({"YCbCr", "Gray", "RGB"})
_CHROMA_STEPS = {"422": (1, 2), "411": (1, 4), "440": (2, 1)}  # rows and columns that share a chroma sample
_HARMLESS = ("extraneous bytes", "JFIF revision", "Adobe color transform", "Invalid SOS parameters")
_ROUNDING = 1e-6  # tolerance for box edges computed in floating point, in pixels


def image_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width in pixels, read from the header only, before any EXIF rotation.

    Raises:
        DataError: not an image; `TooManyPixelsError` if it has more than `max_pixels` pixels.
    """
    header = _jpeg_header(data)
    if header is None:
        with _open(data) as image:
            width, height = image.size
    else:
        height, width = header[:2]
    _check_num_pixels(height, width, max_pixels)
    return height, width


def decode(data: bytes, *, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decodes the whole image: height x width x `channels` (1 or 3).

    Raises:
        DataError: not an image, damaged, or more than `max_pixels` pixels.
    """
    _check_channels(channels)
    height, width = image_size(data, max_pixels=max_pixels)
    if _is_plain_jpeg(data):
        return _decode_with_turbo(data, channels, height, width, denominator=1)[0]
    return _decode_with_pillow(data, channels)


def decode_crop(
    data: bytes,
    *,
    box: Box,
    size: int | tuple[int, int],
    channels: int = 3,
    out: Pixels | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """Decodes `box` = (top, left, height, width) and resizes it to `size` by antialiased bilinear interpolation.

    The result equals Pillow's `crop(box).resize(size, BILINEAR)` on the whole image to less than 4 of 255 on average:
    about 0.4 on photographs, less than 1 for boxes of at most 64 x 64 pixels. Larger boxes full of fine patterns in
    pure colours differ by up to 9, because colours are clamped after the resize. Only what the crop needs is decoded:
    no block below it or beside it. A larger box of at least three times `size` is decoded at 1/2, 1/4 or 1/8 of its
    resolution, by a smaller inverse DCT (Ying et al. 2018, arXiv:1811.06992, fuse decode and crop).

    Args:
        size: side of a square, or (rows, columns).
        out: buffer for the pixels, (*size, channels), uint8; allocated if None.

    Raises:
        DataError: not an image, damaged, more than `max_pixels` pixels, or `box`, `size`, `channels` or `out` is
            invalid.
    """
    _check_channels(channels)
    out = _output_buffer(_pair(size), channels, out)
    if not _crop_with_library(data, box, channels, max_pixels, out):
        height, width = image_size(data, max_pixels=max_pixels)
        _check_box(box, height, width)
        _crop_without_library(data, (height, width), box, channels, out)
    return out


def _crop_with_library(data: bytes, box: FloatBox, channels: int, max_pixels: int, out: Pixels) -> bool:
    if data[:3] != _JPEG_START:
        return False
    contiguous = out if out.flags.c_contiguous else np.empty(out.shape, dtype=np.uint8)
    done = library.crop(bytes(data), box, channels=channels, max_pixels=max_pixels, out=contiguous)
    if done and contiguous is not out:
        out[...] = contiguous
    return done


def _output_buffer(shape: tuple[int, int], channels: int, out: Pixels | None) -> Pixels:
    full = (*shape, channels)
    if min(full) < 1:
        raise DataError(f"size={shape} must be at least 1 x 1, for example 224")
    if out is None:
        return np.empty(full, dtype=np.uint8)
    if out.shape != full or out.dtype != np.uint8:
        raise DataError(f"out is {out.shape} {out.dtype}; it must be {full} uint8")
    return out


def _crop_without_library(data: bytes, full: tuple[int, int], box: FloatBox, channels: int, out: Pixels) -> None:
    header = _jpeg_header(data)
    if header is not None and header[2] in _PLAIN_COLOURS:
        denominator = _denominator(box, out.shape[:2], _CHROMA_STEPS.get(header[3], (1, 1)))
        pixels, denominator = _decode_with_turbo(data, channels, *full, denominator=denominator)
        box = (box[0] / denominator, box[1] / denominator, box[2] / denominator, box[3] / denominator)
    else:
        pixels = _decode_with_pillow(data, channels)
    out[...] = resize_box(pixels, box, out.shape[:2])


def resize_box(pixels: Pixels, box: FloatBox, size: tuple[int, int]) -> Pixels:
    """Antialiased bilinear resize of a box of `pixels` (rows x columns x channels) to `size`.

    Pixels outside the box are not read; a pixel that an edge of the box cuts through is read whole.
    """
    top, left = math.floor(box[0]), math.floor(box[1])
    view = pixels[top : math.ceil(box[0] + box[2] - _ROUNDING), left : math.ceil(box[1] + box[3] - _ROUNDING)]
    if all(float(edge).is_integer() for edge in box):
        return _resize(view, size)
    view = np.ascontiguousarray(view)
    image = Image.fromarray(view[..., 0] if view.shape[2] == 1 else view)
    right, bottom = min(box[1] - left + box[3], image.width), min(box[0] - top + box[2], image.height)
    edges = (box[1] - left, box[0] - top, right, bottom)
    resized = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=edges))
    return np.ascontiguousarray(resized.reshape(*size, pixels.shape[2]))


def _resize(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    # For channels-last uint8, torch has a vectorised path that is three times as fast as Pillow.
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized.squeeze(0).permute(1, 2, 0).numpy())


def _denominator(box: FloatBox, size: tuple[int, int], chroma_step: tuple[int, int]) -> int:
    """Largest of 8, 4, 2, 1 at which the box still has at least 1.5 times the rows and columns of the output.

    A small inverse DCT cuts frequencies off sharply; only with more pixels than the output does the resize hide this.
    `chroma_step` counts the rows and columns that share a chroma sample after the inverse DCT.
    """
    if box[2] * box[3] <= _SMALL:
        return 1
    surplus = min(box[2] / size[0] / chroma_step[0], box[3] / size[1] / chroma_step[1]) / 1.5
    return next(power for power in (8, 4, 2, 1) if power <= surplus or power == 1)


def _jpeg_header(data: bytes) -> tuple[int, int, str, str] | None:
    """Height, width, colour space and subsampling of a JPEG; None if libjpeg-turbo does not support the file."""
    if data[:3] != _JPEG_START:
        return None
    import simplejpeg  # late, for machines that decode nothing, such as those of GPU tests

    try:
        height, width, colour, subsampling = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a colour space or subsampling that simplejpeg does not list
        return None
    return int(height), int(width), str(colour), str(subsampling)


def _is_plain_jpeg(data: bytes) -> bool:
    header = _jpeg_header(data)
    return header is not None and header[2] in _PLAIN_COLOURS


def jpeg_color_space(data: bytes) -> str | None:
    """Colour space of a JPEG, such as YCbCr, Gray or CMYK; None if libjpeg-turbo does not support the file."""
    header = _jpeg_header(data)
    return None if header is None else header[2]


def _decode_with_turbo(data: bytes, channels: int, height: int, width: int, *, denominator: int) -> tuple[Pixels, int]:
    """The whole image at 1 / denominator of its resolution, and the denominator used (1 after a fallback to Pillow)."""
    pixels = _turbo(data, "RGB" if channels == 3 else "GRAY", height, width, denominator)
    return (_decode_with_pillow(data, channels), 1) if pixels is None else (pixels, denominator)


def _turbo(data: bytes, colour: str, height: int, width: int, denominator: int) -> Pixels | None:
    """Pixels from libjpeg-turbo, or None if it has objections that do not concern pixels; Pillow has none."""
    rows, columns = -(-height // denominator), -(-width // denominator)
    import simplejpeg

    options: dict[str, Any] = {"min_height": rows, "min_width": columns, "min_factor": denominator}
    try:
        return np.asarray(simplejpeg.decode_jpeg(data, colour, **options), dtype=np.uint8)
    except (ValueError, KeyError) as error:
        if not any(text in str(error) for text in _HARMLESS):
            raise DataError(f"the JPEG is damaged: {error}") from error
        return None


def _open(data: bytes) -> Image.Image:
    """Opens a file as the format that its first bytes say; no other plugin of Pillow sees it."""
    if len(data) == 0:
        raise DataError("the file is empty (0 bytes)")
    name = sniff(data)
    if name == "heic":
        _register_heic()
    try:
        return Image.open(io.BytesIO(data), formats=[PILLOW_NAMES.get(name, name)] if name else [])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixelsError(f"the image is absurdly large: {error}") from error
    except UnidentifiedImageError as error:  # its message only names the BytesIO object
        raise DataError("not an image: unknown format or damaged header") from error
    except KeyError as error:
        package = "; `pip install 'megabatch[heic]'` adds a reader" if name == "heic" else ""
        raise NoDecoderError(f"the installed Pillow cannot read {name} files; convert them to JPEG{package}") from error
    except PILLOW_ERRORS as error:
        raise DataError(f"not an image that Pillow can read: {error}") from error


@functools.cache
def _register_heic() -> None:
    """Makes Pillow read HEIC, if pillow-heif is installed; it applies the rotation, which HEIC stores as a property."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener(thumbnails=False)


def _decode_with_pillow(data: bytes, channels: int) -> Pixels:
    header = _jpeg_header(data)
    if header is not None and header[2] not in _PLAIN_COLOURS:  # Pillow does not report damage inside, turbo does
        _turbo(data, "CMYK", header[0], header[1], denominator=8)
    with _open(data) as image:
        try:
            return _to_channels(image, channels)
        except PILLOW_ERRORS as error:
            raise DataError(f"the {image.format} image is damaged: {error}") from error


def _to_channels(image: Image.Image, channels: int) -> Pixels:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's conversion clips at 255 instead of scaling
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(wide, 0, 65535) // 257).astype(np.uint8))
    flat = image.convert("RGB" if channels == 3 else "L")
    return np.array(flat, dtype=np.uint8).reshape(flat.height, flat.width, channels)


def _check_num_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise TooManyPixelsError(
            f"the image is absurdly large: {width} x {height} pixels, more than max_pixels={max_pixels}"
        )


def _check_box(box: Box, height: int, width: int) -> None:
    top, left, rows, columns = box
    if top < 0 or left < 0 or rows < 1 or columns < 1 or top + rows > height or left + columns > width:
        raise DataError(f"the box (top, left, height, width) = {box} is not inside the {height} x {width} image")


def _check_channels(channels: int) -> None:
    if channels not in {1, 3}:
        raise DataError(f"channels={channels} must be 1 (grey) or 3 (RGB)")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
