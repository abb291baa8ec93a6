"""The check, the quick probe and the decoders of training give every odd file the same verdict: good or bad."""

import random
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from damaged_files import jpeg, png
from photographs import encode, photograph
from PIL import Image

from megabatch.data.checking.check_file import BAD_KINDS, inspect_image
from megabatch.data.jpeg import library
from megabatch.data.jpeg.decode import decode, decode_crop, image_size
from megabatch.data.jpeg.ends import check_file_ends, image_end
from megabatch.errors import DataError

PHOTO = photograph(45, 61)
FILM = b"\0\0\0\x18ftypmp42" + bytes(12) + random.Random(4).randbytes(5000).replace(b"\xff\xd9", b"") + b"\xff\xda" * 3
GREY_64 = Image.fromarray(PHOTO).quantize(64)


def with_thumbnail(data: bytes) -> bytes:
    """Adds an APP1 segment that holds a small JPEG."""
    small = encode(photograph(8, 8))
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(small) + 2) + small + data[2:]


WHOLE: dict[str, bytes] = {
    "baseline.jpg": encode(PHOTO),
    "large.jpg": encode(photograph(150, 200), quality=90),
    "444.jpg": encode(PHOTO, subsampling=0),
    "411.jpg": simplejpeg.encode_jpeg(PHOTO, 90, "RGB", "411"),
    "progressive.jpg": encode(PHOTO, progressive=True),
    "restarts.jpg": encode(PHOTO, restart_marker_blocks=2),
    "grey.jpg": encode(PHOTO, mode="L"),
    "cmyk.jpg": encode(PHOTO, mode="CMYK"),
    "rgb.jpg": encode(PHOTO, keep_rgb=True),
    "thumbnail.jpg": with_thumbnail(encode(PHOTO)),
    "plain.png": encode(PHOTO, "PNG"),
    "plain.gif": png(GREY_64, format="GIF"),
    "moving.gif": png(GREY_64, format="GIF", save_all=True, append_images=[Image.new("P", GREY_64.size)]),
    "lossy.webp": encode(PHOTO, "WEBP"),
    "lossless.webp": encode(PHOTO, "WEBP", lossless=True),
    "plain.bmp": encode(PHOTO, "BMP"),
    "palette.bmp": png(GREY_64, format="BMP"),
    "plain.tif": encode(PHOTO, "TIFF"),
    "lzw.tif": encode(PHOTO, "TIFF", compression="tiff_lzw"),
    "plain.ppm": encode(PHOTO, "PPM"),
}
STORES_ITS_END = sorted(name for name in WHOLE if not name.endswith((".tif", ".ppm")))

TRAILERS: dict[str, bytes] = {
    "line end": b"\r\n",
    "zero": b"\0",
    "zeros": bytes(3000),
    "text": b"camera notes" * 500,
    "film": FILM,
    "another image": WHOLE["baseline.jpg"],
    "another image, truncated": WHOLE["baseline.jpg"][:-300],
    "its end again": b"\xff\xd9",
}

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "1 byte short": lambda data: data[:-1],
    "2 bytes short": lambda data: data[:-2],
    "12 bytes short": lambda data: data[:-12],
    "200 bytes short": lambda data: data[:-200],
    "half": lambda data: data[: len(data) // 2],
    "100 bytes": lambda data: data[:100],
    "10 bytes": lambda data: data[:10],
    "half, then another": lambda data: data[: len(data) // 2] + data,
    "200 bytes short, then another": lambda data: data[:-200] + data,
    "2 bytes short, then another": lambda data: data[:-2] + data,
    "half, then zeros": lambda data: data[: len(data) // 2] + bytes(3000),
    "2 bytes short, then zeros": lambda data: data[:-2] + bytes(3000),
    "half, then a film": lambda data: data[: len(data) // 2] + FILM,
    "half, then an end": lambda data: data[: len(data) // 2] + b"\xff\xd9",
    "half, then its end": lambda data: data[: len(data) // 2] + data[-12:],
    "zeros inside": lambda data: data[: len(data) // 2] + bytes(20) + data[len(data) // 2 + 20 :],
    "restarts inside": lambda data: data[: len(data) // 2] + b"\xff\xd3" * 20 + data[len(data) // 2 + 40 :],
    "9 bytes missing inside": lambda data: data[: len(data) // 2] + data[len(data) // 2 + 9 :],
    "a byte before it": lambda data: b"\n" + data,
}


def scan_parameters(data: bytes) -> int:
    """Offset of the last three bytes of the last SOS segment."""
    at = data.rindex(b"\xff\xda")
    return at + 5 + 2 * data[at + 4]


ODD_JPEG: dict[str, Callable[[bytes], bytes]] = {
    "stray bytes": lambda data: data[:20] + b"abc" + data[20:],
    "fill bytes": lambda data: data[:-2] + b"\xff\xff\xff\xd9",
    "padded scan": lambda data: data[:-2] + bytes(4) + b"\xff\xd9",
    "unknown JFIF version": lambda data: data.replace(b"JFIF\0\x01", b"JFIF\0\x02"),
    "unknown Adobe transform": lambda data: data[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x07" + data[2:],
    "unusual scan parameters": lambda data: (
        data[: scan_parameters(data)] + b"\0\x3e\0" + data[scan_parameters(data) + 3 :]
    ),
    "a marker without a length": lambda data: data[:-2] + b"\xff\x01\xff\xd9",
    "a comment after the scan": lambda data: data[:-2] + b"\xff\xfe\0\x04hi\xff\xd9",
    "the last scan twice": lambda data: data[:-2] + data[data.rindex(b"\xff\xda") :],
    "two starts": lambda data: b"\xff\xd8" + data,
    "a byte after the start": lambda data: b"\xff\xd8\0" + data[2:],
    "a reserved marker": lambda data: data[:2] + b"\xff\x02\0\x04hi" + data[2:],
    "an extension marker": lambda data: data[:2] + b"\xff\xf9\0\x04hi" + data[2:],
    "a long restart interval": lambda data: data[:2] + b"\xff\xdd\0\x06\0\0\0\0" + data[2:],
    "wrong factors": lambda data: data.replace(b"\x01\x22\0", b"\x01\x71\0").replace(
        b"\x01\x11\0\xff", b"\x01\x71\0\xff"
    ),
}
ODD_WEBP: dict[str, Callable[[bytes], bytes]] = {
    f"length off by {change}": lambda data, change=change: (
        data[:4] + struct.pack("<I", len(data) - 8 + change) + data[8:]
    )
    for change in (-20, -1, 1, 1000)
}
ODD_BMP: dict[str, Callable[[bytes], bytes]] = {
    "no file size": lambda data: data[:2] + bytes(4) + data[6:],
    "wrong file size": lambda data: data[:2] + struct.pack("<I", 60) + data[6:],
}
ODD_OF = {".jpg": ODD_JPEG, ".webp": ODD_WEBP, ".bmp": ODD_BMP}


def variants(name: str) -> Iterator[tuple[str, bytes]]:
    whole = WHOLE[name]
    yield "whole", whole
    for what, trailer in TRAILERS.items():
        yield what, whole + trailer
    for what, change in (DAMAGE | ODD_OF.get(Path(name).suffix, {})).items():
        yield what, change(whole)


def is_decoded(work: Callable[[], object]) -> bool:
    try:
        work()
    except DataError:
        return False
    return True


def whole_crop(data: bytes) -> np.ndarray:
    height, width = image_size(data)
    return decode_crop(data, box=(0, 0, height, width), size=24)


def is_good(data: bytes, ending: str) -> bool:
    """The check's verdict."""
    with warnings.catch_warnings():  # as `check` does
        warnings.simplefilter("ignore")
        return not any(kind in BAD_KINDS for kind, _ in inspect_image(data, ending))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged headers
@pytest.mark.parametrize("name", sorted(WHOLE))
def test_check_probe_and_decoders_agree_on_every_odd_file(name, tmp_path, library_folder, monkeypatch):
    for what, data in variants(name):
        good = is_decoded(lambda data=data: decode(data))
        assert is_good(data, name.rpartition(".")[2]) == good, what
        for folder in (library_folder, tmp_path / "no library here"):
            monkeypatch.setattr(library, "library_folder", folder)
            library._function.cache_clear()
            assert is_decoded(lambda data=data: whole_crop(data)) == good, (what, folder)
        (tmp_path / name).write_bytes(data)
        fault = check_file_ends(tmp_path / name)
        assert fault is None or not good, (what, fault)
    library._function.cache_clear()


@pytest.mark.parametrize("trailer", sorted(TRAILERS))
@pytest.mark.parametrize("name", sorted(WHOLE))
def test_bytes_after_an_image_are_odd_and_do_not_change_its_pixels(name, trailer):
    data = WHOLE[name] + TRAILERS[trailer]
    assert np.array_equal(decode(data), decode(WHOLE[name]))
    odd = {kind for kind, _ in inspect_image(data, name.rpartition(".")[2])}
    assert not odd & BAD_KINDS
    assert ("trailing bytes" in odd) == (name in STORES_ITS_END)
    assert image_end(data) == (len(WHOLE[name]) if name in STORES_ITS_END else len(data))


@pytest.mark.parametrize("format", ["ICO", "TGA", "PCX", "EPS", "DIB", "SGI"])
def test_formats_that_check_does_not_know_are_not_decoded(format):
    data = encode(PHOTO, format)
    assert [kind for kind, _ in inspect_image(data, "jpg")] == ["not an image"]
    with pytest.raises(DataError, match="not an image"):
        decode(data)


def test_a_tiff_with_64_bit_offsets_is_an_image():
    data = encode(PHOTO, "TIFF", big_tiff=True)
    assert data.startswith(b"II+\0")
    assert inspect_image(data, "tif") == []
    assert np.array_equal(decode(data), PHOTO)


@pytest.mark.parametrize("cut", [1, 2, 300])
def test_a_truncated_jpeg_lacks_only_its_end_if_its_pixels_are_complete(cut):
    expected = "truncated" if cut == 300 else "missing end"
    for name in ("baseline.jpg", "progressive.jpg", "cmyk.jpg"):
        assert [kind for kind, _ in inspect_image(WHOLE[name][:-cut], "jpg")] == [expected]


def test_a_truncated_cmyk_jpeg_with_an_end_marker_is_damaged():
    half = WHOLE["cmyk.jpg"][: len(WHOLE["cmyk.jpg"]) // 2] + b"\xff\xd9"
    assert [kind for kind, _ in inspect_image(half, "jpg")] == ["damaged"]


def test_an_image_without_an_end_is_cut_off():
    data = jpeg(comment=b"\xff\xd9 in a comment", progressive=True, restart_marker_blocks=1)
    assert image_end(data + jpeg()) == len(data)
    assert image_end(data[:-2]) is None
    assert image_end(data[:-2] + jpeg()) is None
    for name in STORES_ITS_END:
        assert image_end(WHOLE[name]) == len(WHOLE[name])
        assert image_end(WHOLE[name][:-3]) is None


# ---- the quick check of a file's ends


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("baseline.jpg", "the JPEG is truncated (it has no end marker)"),
        ("plain.png", "the PNG is truncated (it has no end chunk)"),
        ("lossy.webp", "the WebP is truncated (it is shorter than its header says)"),
    ],
)
def test_the_probe_names_the_fault_of_a_truncated_file(tmp_path, name, fault):
    (tmp_path / name).write_bytes(WHOLE[name][:-300])
    assert check_file_ends(tmp_path / name) == fault


def test_a_motion_photo_passes_the_probe_and_a_jpeg_truncated_after_its_thumbnail_does_not(tmp_path):
    (tmp_path / "motion.jpg").write_bytes(WHOLE["large.jpg"] + FILM)
    assert check_file_ends(tmp_path / "motion.jpg") is None
    (tmp_path / "cut.jpg").write_bytes(with_thumbnail(WHOLE["large.jpg"])[:-3000])
    assert check_file_ends(tmp_path / "cut.jpg") == "the JPEG is truncated (it has no end marker)"


def test_a_png_without_its_end_chunk_passes_the_probe_because_it_decodes(tmp_path):
    (tmp_path / "1.png").write_bytes(WHOLE["plain.png"][:-12])
    assert check_file_ends(tmp_path / "1.png") is None
    assert np.array_equal(decode(WHOLE["plain.png"][:-12]), PHOTO)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "gif", "tiff", "ppm", "jpg"])
def test_whole_files_of_every_format_pass(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (160, 200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"image.{suffix}")
    assert check_file_ends(tmp_path / f"image.{suffix}") is None
