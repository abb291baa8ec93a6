"""Bytes of an image file to uint8 pixels, decoding no more than a crop needs.

Every function takes the file's bytes and returns height x width x channels, RGB or grey. Plain JPEG goes to
libjpeg-turbo, every other format that Pillow reads goes to Pillow; an animation gives its first frame, transparency
is dropped, 16 bits become 8, CMYK becomes RGB. EXIF orientation is ignored, as torchvision's ImageFolder does,
because most training sets were labelled and evaluated that way.

Anything that cannot be decoded whole raises `DataError` with the reason; no function returns half an image.
"""

import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image

from megabatch.errors import DataError

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
FloatBox = tuple[float, float, float, float]

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB; the largest image of ImageNet has 61 million
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError, struct.error)
_PILLOW_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def image_size(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width in pixels, from the header alone, before any EXIF rotation."""
    header = _jpeg_header(data)
    if header is None:
        with _open(data) as image:
            width, height = image.size
    else:
        height, width = header[:2]
    _refuse_bomb(height, width, max_pixels)
    return height, width


def decode(data: bytes, *, channels: int = 3, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The whole image, height x width x `channels` (1 or 3)."""
    _check_channels(channels)
    height, width = image_size(data, max_pixels=max_pixels)
    if _is_plain_jpeg(data):
        return _turbo(data, channels, height, width, denominator=1)
    return _pillow(data, channels)


def decode_crop(
    data: bytes,
    *,
    box: Box,
    size: int | tuple[int, int],
    channels: int = 3,
    out: Pixels | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """The pixels of `box` = (top, left, height, width), resized to `size` by antialiased bilinear sampling.

    The result is that of Pillow's `resize(size, BILINEAR, box=...)` on the whole image, to less than 4 of 255 on
    average, but only what the crop needs is decoded: a crop k times larger than `size` is decoded at 1/2, 1/4 or
    1/8 of its resolution by a smaller inverse DCT. With `out` (size x channels, uint8) the pixels are written there.
    """
    height, width = image_size(data, max_pixels=max_pixels)
    _check_box(box, height, width)
    return _crop(data, (height, width), box, size, channels, out)


def decode_center(
    data: bytes,
    *,
    size: int | tuple[int, int],
    crop_ratio: float = 0.875,
    channels: int = 3,
    out: Pixels | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Pixels:
    """The central crop for evaluation: `crop_ratio` of the largest central box with the shape of `size`.

    With a square size it is "resize the shorter side to size / crop_ratio, then cut the centre": 0.875 is
    the 256-then-224 of most papers. The crop is exact where two-step implementations round it to a whole pixel.
    """
    if not 0 < crop_ratio <= 1:
        raise DataError(f"crop_ratio={crop_ratio} must be above 0 and at most 1, for example 0.875")
    height, width = image_size(data, max_pixels=max_pixels)
    rows, columns = _pair(size)
    scale = crop_ratio * min(height / rows, width / columns)
    box_height, box_width = rows * scale, columns * scale
    box = ((height - box_height) / 2, (width - box_width) / 2, box_height, box_width)
    return _crop(data, (height, width), box, size, channels, out)


def _crop(
    data: bytes,
    full: tuple[int, int],
    box: FloatBox,
    size: int | tuple[int, int],
    channels: int,
    out: Pixels | None,
) -> Pixels:
    _check_channels(channels)
    shape = _pair(size)
    if out is not None and (out.shape != (*shape, channels) or out.dtype != np.uint8):
        raise DataError(f"out is {out.shape} {out.dtype}; it must be {(*shape, channels)} uint8")
    if _is_plain_jpeg(data):
        denominator = _denominator(box, shape)
        pixels = _turbo(data, channels, *full, denominator=denominator)
        box = (box[0] / denominator, box[1] / denominator, box[2] / denominator, box[3] / denominator)
    else:
        pixels = _pillow(data, channels)
    resized = resize_box(pixels, box, shape)
    if out is None:
        return resized
    out[...] = resized
    return out


def resize_box(pixels: Pixels, box: FloatBox, size: tuple[int, int]) -> Pixels:
    """Antialiased bilinear resize of a box of `pixels` (rows x columns x channels) to `size`."""
    top, left, height, width = box
    if all(float(edge).is_integer() for edge in box):
        view = pixels[int(top) : int(top + height), int(left) : int(left + width)]
        return _resize_whole(view, size)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    edges = (left, top, min(left + width, image.width), min(top + height, image.height))
    resized = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=edges))
    return np.ascontiguousarray(resized.reshape(*size, pixels.shape[2]))


def _resize_whole(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    # torch has a vector instruction path for uint8 with the channels last, three times Pillow's speed
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized.squeeze(0).permute(1, 2, 0).numpy())


def _denominator(box: FloatBox, size: tuple[int, int]) -> int:
    """Largest of 8, 4, 2, 1 at which the box still has at least as many pixels as the output."""
    surplus = min(box[2] / size[0], box[3] / size[1])
    return next(power for power in (8, 4, 2, 1) if power <= surplus or power == 1)


def _jpeg_header(data: bytes) -> tuple[int, int, str] | None:
    """Height, width and colour space of a JPEG; None for what is not one, or not one that libjpeg-turbo knows."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except ValueError:
        return None
    return int(height), int(width), str(colour)


def _is_plain_jpeg(data: bytes) -> bool:
    header = _jpeg_header(data)
    return header is not None and header[2] in {"YCbCr", "Gray", "RGB"}


def _turbo(data: bytes, channels: int, height: int, width: int, *, denominator: int) -> Pixels:
    rows, columns = -(-height // denominator), -(-width // denominator)
    colour = "RGB" if channels == 3 else "GRAY"
    options: dict[str, Any] = {"min_height": rows, "min_width": columns, "min_factor": denominator}
    try:
        pixels = simplejpeg.decode_jpeg(data, colour, **options)
    except ValueError as error:
        if "extraneous bytes" not in str(error):  # stray bytes between markers harm no pixel; cameras write them
            raise DataError(f"the JPEG is damaged: {error}") from error
        pixels = simplejpeg.decode_jpeg(data, colour, strict=False, **options)
    return np.asarray(pixels, dtype=np.uint8)


def _open(data: bytes) -> Image.Image:
    if len(data) == 0:
        raise DataError("the file is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(data))
    except _PILLOW_BOMBS as error:
        raise DataError(f"the image is absurdly large: {error}") from error
    except _PILLOW_ERRORS as error:
        raise DataError(f"not an image that can be read: {error}") from error


def _pillow(data: bytes, channels: int) -> Pixels:
    with _open(data) as image:
        try:
            return _to_channels(image, channels)
        except _PILLOW_ERRORS as error:
            raise DataError(f"the {image.format} image is damaged: {error}") from error


def _to_channels(image: Image.Image, channels: int) -> Pixels:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip at 255 instead of scaling
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(wide, 0, 65535) // 257).astype(np.uint8))
    flat = image.convert("RGB" if channels == 3 else "L")
    return np.array(flat, dtype=np.uint8).reshape(flat.height, flat.width, channels)


def _refuse_bomb(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DataError(f"the image is absurdly large: {width} x {height} pixels, more than max_pixels={max_pixels}")


def _check_box(box: Box, height: int, width: int) -> None:
    top, left, rows, columns = box
    if top < 0 or left < 0 or rows < 1 or columns < 1 or top + rows > height or left + columns > width:
        raise DataError(f"the box (top, left, height, width) = {box} is not inside the {height} x {width} image")


def _check_channels(channels: int) -> None:
    if channels not in {1, 3}:
        raise DataError(f"channels={channels} must be 1 (grey) or 3 (RGB)")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
