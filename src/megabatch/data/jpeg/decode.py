"""Bytes of an image file to uint8 pixels, decoding no more than a crop needs.

Every function takes the file's bytes and returns height x width x channels, RGB or grey. Plain JPEG goes to
libjpeg-turbo, every other format that Pillow reads goes to Pillow; an animation gives its first frame, transparency
is dropped, 16 bits become 8, CMYK becomes RGB. EXIF orientation is ignored, as torchvision's ImageFolder does,
because most training sets were labelled and evaluated that way.

Anything that cannot be decoded whole raises `DataError` with the reason; no function returns half an image. Damage
inside a JPEG that lies past the crop's last row may go unseen, as those rows are not read; a missing end never does.

`decode_crop` and `decode_center` use the compiled decoder of `library.py` where it is built and the file is a plain
baseline JPEG. Every function may be called from many threads: the time is spent without the GIL.
"""

import io
import math
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError

from megabatch.data.jpeg import library
from megabatch.errors import DataError

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
FloatBox = tuple[float, float, float, float]

MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB of RGB; the largest image of ImageNet has 61 million
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError, struct.error)
_ROUNDING = 1e-6  # a box that ends this little past a pixel's edge ends there
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
        return _turbo(data, channels, height, width, denominator=1)[0]
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

    The result is that of Pillow's `crop(box).resize(size, BILINEAR)` on the whole image, to less than 4 of 255 on
    average (about 0.5 on photographs), but only what the crop needs is decoded: no row below it, no pixel beside it,
    and a crop at least three times larger than `size` at 1/2, 1/4 or 1/8 of its resolution, by a smaller inverse DCT
    (Ying et al. 2018, arXiv:1811.06992, fuse decode and crop). With `out` (size x channels, uint8) the pixels are
    written there.
    """
    _check_channels(channels)
    out = _output(_pair(size), channels, out)
    if not _native(data, box, channels, max_pixels, out):
        height, width = image_size(data, max_pixels=max_pixels)
        _check_box(box, height, width)
        _crop(data, (height, width), box, channels, out)
    return out


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
    _check_channels(channels)
    out = _output((rows, columns), channels, out)
    if not _native(data, box, channels, max_pixels, out):
        _crop(data, (height, width), box, channels, out)
    return out


def _native(data: bytes, box: FloatBox, channels: int, max_pixels: int, out: Pixels) -> bool:
    if data[:2] != b"\xff\xd8":
        return False
    whole = out if out.flags.c_contiguous else np.empty(out.shape, dtype=np.uint8)
    done = library.crop(bytes(data), box, channels=channels, max_pixels=max_pixels, out=whole)
    if done and whole is not out:
        out[...] = whole
    return done


def _output(shape: tuple[int, int], channels: int, out: Pixels | None) -> Pixels:
    full = (*shape, channels)
    if min(full) < 1:
        raise DataError(f"size={shape} must be at least 1 x 1, for example 224")
    if out is None:
        return np.empty(full, dtype=np.uint8)
    if out.shape != full or out.dtype != np.uint8:
        raise DataError(f"out is {out.shape} {out.dtype}; it must be {full} uint8")
    return out


def _crop(data: bytes, full: tuple[int, int], box: FloatBox, channels: int, out: Pixels) -> None:
    if _is_plain_jpeg(data):
        pixels, denominator = _turbo(data, channels, *full, denominator=_denominator(box, out.shape[:2]))
        box = (box[0] / denominator, box[1] / denominator, box[2] / denominator, box[3] / denominator)
    else:
        pixels = _pillow(data, channels)
    out[...] = resize_box(pixels, box, out.shape[:2])


def resize_box(pixels: Pixels, box: FloatBox, size: tuple[int, int]) -> Pixels:
    """Antialiased bilinear resize of a box of `pixels` (rows x columns x channels) to `size`.

    Nothing outside the box is looked at, but for the rest of a pixel that an edge cuts through.
    """
    top, left = math.floor(box[0]), math.floor(box[1])
    view = pixels[top : math.ceil(box[0] + box[2] - _ROUNDING), left : math.ceil(box[1] + box[3] - _ROUNDING)]
    if all(float(edge).is_integer() for edge in box):
        return _resize_whole(view, size)
    view = np.ascontiguousarray(view)
    image = Image.fromarray(view[..., 0] if view.shape[2] == 1 else view)
    right, bottom = min(box[1] - left + box[3], image.width), min(box[0] - top + box[2], image.height)
    edges = (box[1] - left, box[0] - top, right, bottom)
    resized = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=edges))
    return np.ascontiguousarray(resized.reshape(*size, pixels.shape[2]))


def _resize_whole(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    # torch has a vector instruction path for uint8 with the channels last, three times Pillow's speed
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).unsqueeze(0)
    resized = torch.nn.functional.interpolate(planes, size, mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized.squeeze(0).permute(1, 2, 0).numpy())


def _denominator(box: FloatBox, size: tuple[int, int]) -> int:
    """Largest of 8, 4, 2, 1 at which the box still has half as many pixels again as the output, each way.

    A small inverse DCT cuts frequencies off sharply; only with pixels to spare does the resize hide it.
    """
    surplus = min(box[2] / size[0], box[3] / size[1]) / 1.5
    return next(power for power in (8, 4, 2, 1) if power <= surplus or power == 1)


def _jpeg_header(data: bytes) -> tuple[int, int, str] | None:
    """Height, width and colour space of a JPEG; None for what is not one, or not one that libjpeg-turbo knows."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a colour space or subsampling that it has no name for
        return None
    return int(height), int(width), str(colour)


def _is_plain_jpeg(data: bytes) -> bool:
    header = _jpeg_header(data)
    return header is not None and header[2] in {"YCbCr", "Gray", "RGB"}


def suits_a_gpu(data: bytes) -> bool:
    """Whether a file is a JPEG in YCbCr or grey with its end in place, which is what nvJPEG decodes as others do."""
    header = _jpeg_header(data)
    return header is not None and header[2] in {"YCbCr", "Gray"} and data[-2:] == b"\xff\xd9"


def _turbo(data: bytes, channels: int, height: int, width: int, *, denominator: int) -> tuple[Pixels, int]:
    """The whole image at 1 / denominator of its resolution, and that denominator, which may come back as 1."""
    rows, columns = -(-height // denominator), -(-width // denominator)
    colour = "RGB" if channels == 3 else "GRAY"
    options: dict[str, Any] = {"min_height": rows, "min_width": columns, "min_factor": denominator}
    try:
        pixels = simplejpeg.decode_jpeg(data, colour, **options)
    except (ValueError, KeyError) as error:
        if "extraneous bytes" not in str(error):
            raise DataError(f"the JPEG is damaged: {error}") from error
        return _pillow(data, channels), 1  # stray bytes between markers harm no pixel, and Pillow passes over them
    return np.asarray(pixels, dtype=np.uint8), denominator


def _open(data: bytes) -> Image.Image:
    if len(data) == 0:
        raise DataError("the file is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(data))
    except _PILLOW_BOMBS as error:
        raise DataError(f"the image is absurdly large: {error}") from error
    except UnidentifiedImageError as error:  # its text names an object in memory, of use to no one
        raise DataError("not an image that can be read: no format that is known, or a broken header") from error
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
