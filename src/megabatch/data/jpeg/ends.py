"""Where an image file ends, and a quick check of a file's beginning and end.

An image file is judged by its first image. Bytes behind it, such as the film of a motion photo, previews, or padding,
do not make it bad. The end is found by walking from the start, segment by segment: anything may follow it.
"""

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

from megabatch.data.jpeg.decode import decode, image_size, jpeg_color_space
from megabatch.data.jpeg.formats import sniff
from megabatch.errors import DataError

_END, _START = 0xD9, 0xD8
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")  # but stuffed FF 00, TEM, RST0 to RST7 and fill bytes
_FIRST_BYTES, _LAST_BYTES = 1 << 16, 1 << 10
_NO_END = {
    "jpeg": "the JPEG is truncated (it has no end marker)",
    "png": "the PNG is truncated (it has no end chunk)",
    "webp": "the WebP is truncated (it is shorter than its header says)",
}


def image_end(data: bytes) -> int | None:
    """Offset one past the first image of a file; None if the data end before that.

    Formats that store no end (TIFF, PNM, JPEG 2000, AVIF, HEIC, compressed BMP) end with the data.
    """
    walk = _WALKS.get(sniff(data) or "")
    try:
        end = walk(data) if walk else len(data)
    except (IndexError, struct.error):  # the data end within a field
        return None
    return end if end is not None and end <= len(data) else None


def _jpeg_end(data: bytes) -> int | None:
    at = 2
    while (match := _MARKER.search(data, at)) is not None:
        at = match.start()
        if data[at + 1] == _END:
            return at + 2
        if data[at + 1] == _START:  # of another image: this one was cut off
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _png_end(data: bytes) -> int:
    at, name = 8, b""
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", data, at)
        at += 12 + length
    return at


def _gif_end(data: bytes) -> int | None:
    at = 13 + _color_table_bytes(data[10])
    while data[at] != ord(";"):
        if data[at] == ord(","):  # an image: header, color table, code size
            at += 11 + _color_table_bytes(data[at + 9])
        elif data[at] == ord("!"):  # an extension
            at += 2
        else:
            return None
        while data[at]:  # blocks, each after its length
            at += 1 + data[at]
        at += 1
    return at + 1


def _color_table_bytes(flags: int) -> int:
    return 3 << (1 + (flags & 7)) if flags & 0x80 else 0


def _webp_end(data: bytes) -> int:
    return 8 + int.from_bytes(data[4:8], "little")


def _bmp_end(data: bytes) -> int:
    """The end of the rows; the header's file size is wrong in many files."""
    start, header, width, height, _, bits, compression = struct.unpack_from("<IIiiHHI", data, 10)
    if header < 40 or compression not in {0, 3}:
        return len(data)
    return int(start + abs(height) * ((abs(width) * bits + 31) // 32 * 4))


def is_gpu_decodable(data: bytes) -> bool:
    """True for a complete YCbCr or grey JPEG, which nvJPEG decodes in the same way as CPU decoders."""
    return jpeg_color_space(data) in {"YCbCr", "Gray"} and image_end(data) is not None


_WALKS: dict[str, Callable[[bytes], int | None]] = {
    "jpeg": _jpeg_end,
    "png": _png_end,
    "gif": _gif_end,
    "webp": _webp_end,
    "bmp": _bmp_end,
}


def check_file_ends(path: Path) -> str | None:
    """Describes a fault that an image file's first and last bytes show; None if they show none.

    A fault is reported only if `decode` rejects the file: a file that looks odd is read completely and decoded.
    Damage in the middle of a file is not found.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(_FIRST_BYTES)
        file.seek(max(0, size - _LAST_BYTES))
        end = file.read()
    return None if _looks_complete(start, end, size) else _fault(path.read_bytes())


def _looks_complete(start: bytes, end: bytes, size: int) -> bool:
    try:
        image_size(start)
    except DataError:  # or the header is longer, or at another place, as in TIFF
        return False
    has_end = {"jpeg": b"\xff\xd9" in end, "png": b"IEND" in end, "webp": size >= _webp_end(start)}
    return has_end.get(sniff(start) or "", True)


def _fault(data: bytes) -> str | None:
    is_cut_off = image_end(data) is None
    try:
        (decode if is_cut_off else image_size)(data)
    except DataError as error:
        return _NO_END.get(sniff(data) or "", str(error)) if is_cut_off else str(error)
    return None
