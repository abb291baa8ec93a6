"""Damaged and odd image files: empty, truncated, of another format, 16-bit, animated, decompression bombs."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
from photographs import encode, photograph
from PIL import Image

SEEDS = iter(range(1, 10**6))


def jpeg(**options) -> bytes:
    """A photograph; every call gives another one, so that no two files are duplicates."""
    return encode(photograph(48, 64, next(SEEDS)), **options)


def png(image: Image.Image, **options) -> bytes:
    """`image` as a PNG, or in another `format`, without conversion to RGB."""
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


def pixels() -> np.ndarray:
    return photograph(48, 64, next(SEEDS))


def bomb_jpeg() -> bytes:
    """A header that claims 65,500 x 65,500 pixels."""
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def deep_rgb_png() -> bytes:
    """RGB with 16 bits per channel, which Pillow can read but not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels().astype(np.uint16) * 257)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def animation(format: str) -> bytes:
    frames = [Image.fromarray(pixels()) for _ in range(3)]
    if format == "GIF":
        frames = [frame.quantize() for frame in frames]
    return png(frames[0], format=format, save_all=True, append_images=frames[1:])


def rotated_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(exif=exif)


def broken_in_the_middle() -> bytes:
    data = bytearray(jpeg(quality=95))
    middle = len(data) // 2
    data[middle : middle + 300] = b"\xff\xd3" * 150
    return bytes(data)


def stray_bytes() -> bytes:
    data = jpeg()
    return data[:20] + b"abc" + data[20:]  # after the first segment


# (file name, function that makes the content, kinds that `check` must report)
FILES: list[tuple[str, Callable[[], bytes], set[str]]] = [
    ("empty.jpg", lambda: b"", {"empty"}),
    ("truncated.jpg", lambda: jpeg()[:-400], {"truncated"}),
    ("header-only.jpg", lambda: jpeg()[:120], {"truncated"}),
    ("truncated.png", lambda: encode(pixels(), "PNG")[:-400], {"truncated"}),
    ("truncated.gif", lambda: encode(pixels(), "GIF")[:-400], {"truncated"}),
    ("truncated.webp", lambda: encode(pixels(), "WEBP")[:-400], {"truncated"}),
    ("truncated.bmp", lambda: encode(pixels(), "BMP")[:-400], {"truncated"}),
    ("no-end.jpg", lambda: jpeg()[:-2], {"missing end"}),
    ("broken.jpg", broken_in_the_middle, {"damaged"}),
    ("broken.png", lambda: encode(pixels(), "PNG").replace(b"IDAT", b"IDAX"), {"damaged"}),
    ("text.jpg", lambda: b"this is no image at all", {"not an image"}),
    ("page.jpg", lambda: b"<!DOCTYPE html><title>404</title>", {"not an image"}),
    ("pointer.jpg", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", {"not an image"}),
    ("zeros.jpg", lambda: bytes(5000), {"not an image"}),
    ("a-png.jpg", lambda: encode(pixels(), "PNG"), {"wrong ending"}),
    ("a-webp.jpeg", lambda: encode(pixels(), "WEBP"), {"wrong ending"}),
    ("a-jpeg.png", jpeg, {"wrong ending"}),
    ("inks.jpg", lambda: jpeg(mode="CMYK"), {"CMYK"}),
    ("deep-grey.png", lambda: png(Image.fromarray(pixels()[..., 0].astype(np.uint16) * 257)), {"16 bit"}),
    ("deep-rgb.png", deep_rgb_png, {"16 bit"}),
    ("float.tiff", lambda: png(Image.fromarray(pixels()[..., 0].astype(np.float32)), format="TIFF"), {"16 bit"}),
    ("moving.gif", lambda: animation("GIF"), {"animated"}),
    ("moving.png", lambda: animation("PNG"), {"animated"}),
    ("pages.tiff", lambda: animation("TIFF"), {"animated"}),
    ("glass.png", lambda: png(Image.fromarray(np.dstack([pixels(), pixels()[..., :1]]))), {"transparent"}),
    ("bomb.png", lambda: encode(np.eye(12_000, dtype=np.uint8), "PNG", mode="1"), {"bomb"}),
    ("bomb.jpg", bomb_jpeg, {"bomb"}),
    ("turned.jpg", rotated_jpeg, {"rotated"}),
    ("stray.jpg", stray_bytes, {"stray bytes"}),
    ("tail.jpg", lambda: jpeg() + b"PK\x03\x04 an archive", {"trailing bytes"}),
    ("tiny.jpg", lambda: encode(photograph(9, 12, next(SEEDS))), {"tiny"}),
    ("rope.png", lambda: encode(photograph(20, 400, next(SEEDS)), "PNG"), {"elongated"}),
    ("blank.jpg", lambda: encode(np.full((30, 30, 3), 77, np.uint8)), {"blank"}),
    ("notes.txt", lambda: b"remember to delete", {"unknown ending"}),
    ("no_ending", jpeg, {"unknown ending"}),
    ("._001.jpg", lambda: b"\0\5\x16\7", {"hidden"}),
    ("line\nbreak.jpg", jpeg, {"odd name"}),
]
