"""Image formats: recognised by a file's first bytes, and the file name extensions of each."""

ENDINGS = {
    "jpeg": frozenset({"jpg", "jpeg", "jpe", "jfif"}),
    "png": frozenset({"png"}),
    "gif": frozenset({"gif"}),
    "webp": frozenset({"webp"}),
    "bmp": frozenset({"bmp"}),
    "tiff": frozenset({"tif", "tiff"}),
    "pnm": frozenset({"ppm", "pgm", "pbm", "pnm"}),
    "jp2": frozenset({"jp2", "j2k"}),
    "avif": frozenset({"avif"}),
    "heic": frozenset({"heic", "heif"}),
}
_PREFERRED_ENDING = {"jpeg": "jpg", "tiff": "tif", "pnm": "ppm"}
PILLOW_NAMES = {"jp2": "JPEG2000", "pnm": "PPM", "heic": "HEIF"}
"""Pillow's name of a format where it is not ours in capitals."""

_STARTS = {
    b"\xff\xd8\xff": "jpeg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"II\0*": "tiff",  # byte order of the header reversed; Pillow reads both
    b"MM*\0": "tiff",
    b"II+\0": "tiff",  # 64-bit offsets
    b"MM\0+": "tiff",
    b"\0\0\0\x0cjP  ": "jp2",
    b"\xff\x4f\xff\x51": "jp2",
}
_PNM = frozenset(b"P%d" % kind for kind in range(1, 7))
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"mif1", b"msf1", b"hevc"})
_MIN_PNM_BYTES = 7


def sniff(data: bytes) -> str | None:
    """Format of an image file, a key of `ENDINGS`, or None if the first bytes match no known format."""
    for start, name in _STARTS.items():
        if data.startswith(start):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":
        return "avif" if data[8:12] in {b"avif", b"avis"} else "heic" if data[8:12] in _HEIC_BRANDS else None
    if data[:2] in _PNM and len(data) >= _MIN_PNM_BYTES and data[2:3].isspace():
        return "pnm"
    return None


def preferred_ending(data: bytes) -> str | None:
    """Usual file name extension for these bytes, without the dot, or None if they are not an image."""
    kind = sniff(data)
    return _PREFERRED_ENDING.get(kind, kind) if kind else None
