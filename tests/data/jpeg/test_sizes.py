"""Sizes and crops of many JPEGs in one call of the compiled library, against one call per file."""

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest
from mutations import mutate_bytes
from photographs import JPEG_LAYOUTS, encode, photograph

from megabatch.data.jpeg import decode as decode_module
from megabatch.data.jpeg import library
from megabatch.data.jpeg.ends import image_end, is_gpu_decodable
from megabatch.data.loading.files import Files, read_files
from megabatch.data.sources.folder import FolderSource

LIMIT = 10**7


class InMemory:
    """A source of files in memory."""

    def __init__(self, files: Sequence[bytes]) -> None:
        self._files = files

    def read(self, index: int) -> bytes:
        return self._files[index]


def held(files: Sequence[bytes]) -> Files:
    return read_files(InMemory(files), np.arange(len(files)))


def sizes(files: Sequence[bytes], **options: object) -> list[list[int]]:
    those = held(files)
    return library.sizes(those.addresses, those.num_bytes, **{"max_pixels": LIMIT, **options}).tolist()


def every_kind() -> list[bytes]:
    """JPEGs of every layout, baseline and progressive, with restart markers and with tables of their own."""
    options = [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"optimize": True}]
    return [
        encode(photograph(40 + i, 64 - i, i), mode=mode, subsampling=subsampling, **more)
        for i, ((mode, subsampling), more) in enumerate(itertools.product(JPEG_LAYOUTS, options))
    ]


def test_every_kind_of_plain_jpeg_has_the_size_that_the_decoder_reads(compiled):
    files = every_kind()
    expected = [list(decode_module.image_size(file)) for file in files]
    assert sizes(files) == sizes(files, complete=True) == expected


@pytest.mark.parametrize("factors", [0x11, 0x12, 0x21, 0x22, 0x41, 0x14, 0x42, 0x33, 0x31, 0x10, 0x51])
@pytest.mark.parametrize("where", [0, 1])
def test_a_size_is_never_given_for_sampling_factors_that_the_decoder_refuses(compiled, factors, where):
    data = bytearray(encode(photograph(32, 48)))
    frame = data.index(b"\xff\xc0")
    data[frame + 11 + 3 * where] = factors
    header = decode_module._jpeg_header(bytes(data))
    assert sizes([bytes(data)])[0] in ([0, 0], list(header[:2]) if header else [0, 0])


def test_files_that_are_not_plain_have_no_size(compiled):
    color = photograph(32, 48)
    rgb = encode(color).replace(b"JFIF", b"XXXX", 1)
    frame = rgb.index(b"\xff\xc0")
    for at, name in zip((10, 13, 16), b"RGB", strict=True):
        rgb = rgb[: frame + at] + bytes([name]) + rgb[frame + at + 1 :]
    odd = [b"", b"\xff\xd8\xff\xd9", encode(color, "PNG"), encode(color, mode="CMYK"), rgb, encode(color)[:200]]
    assert sizes([*odd, encode(color)]) == [[0, 0]] * len(odd) + [[32, 48]]
    assert sizes([encode(color)], max_pixels=32 * 48 - 1) == [[0, 0]]


def test_a_complete_file_ends_with_its_first_image_and_may_have_anything_behind(compiled):
    whole, other = encode(photograph(32, 48)), encode(photograph(16, 16), progressive=True)
    thumbnail = b"\xff\xe1" + (len(other) + 8).to_bytes(2, "big") + b"Exif\0\0" + other
    with_thumbnail = whole[:2] + thumbnail + whole[2:]
    complete = [whole, whole + b"\0" * 9, whole + other, whole + b"film", with_thumbnail]
    cut_off = [whole[:-2], whole[:-2] + b"\0" * 9, whole[:-300] + other, with_thumbnail[:-40]]
    assert sizes([*complete, *cut_off], complete=True) == [[32, 48]] * len(complete) + [[0, 0]] * len(cut_off)
    assert sizes(cut_off) == [[32, 48]] * len(cut_off)


def test_of_damaged_files_only_those_have_a_size_for_which_the_decoder_gives_the_same(compiled):
    rng, seeds = random.Random(11), every_kind()
    files = [mutate_bytes(rng.choice(seeds), rng) for _ in range(4000)]
    known = 0
    for file, size, whole in zip(files, sizes(files), sizes(files, complete=True), strict=True):
        header = decode_module._jpeg_header(file)
        assert size == [0, 0] or size == list(header[:2])
        assert size == [0, 0] or header[2] in {"YCbCr", "Gray"}
        assert whole in ([0, 0], size)
        assert whole == [0, 0] or (is_gpu_decodable(file) and image_end(file) is not None)
        known += whole != [0, 0]
    assert 400 < known < 3600


def test_crops_of_many_files_are_those_of_single_files(compiled):
    files = [*every_kind(), b"", encode(photograph(32, 32), "PNG")]
    boxes = np.array([[1 + i % 5, i % 7, 20 + i % 9, 30 - i % 11] for i in range(len(files))])
    for channels in (1, 3):
        out, one = (np.zeros((len(files), 12, 12, channels), dtype=np.uint8) for _ in range(2))
        those = held(files)
        done = library.crop_many(those.addresses, those.num_bytes, boxes, max_pixels=LIMIT, out=out)
        for i, file in enumerate(files):
            box = tuple(map(float, boxes[i]))
            assert library.crop(file, box, channels=channels, max_pixels=LIMIT, out=one[i]) == done[i]
            assert not done[i] or np.array_equal(out[i], one[i])
        assert done.sum() == 18
    assert not done[-2:].any()


def test_without_the_library_no_size_is_known_and_nothing_is_decoded(plain):
    those = held(every_kind())
    assert not library.sizes(those.addresses, those.num_bytes, max_pixels=LIMIT).any()
    out = np.zeros((len(those.num_bytes), 4, 4, 3), dtype=np.uint8)
    boxes = np.tile([0, 0, 8, 8], (len(out), 1))
    assert not library.crop_many(those.addresses, those.num_bytes, boxes, max_pixels=LIMIT, out=out).any()


def test_files_of_a_folder_are_read_as_they_are_and_a_missing_one_is_empty(tmp_path):
    contents = [b"first", b"", b"third file"]
    for name, content in zip("abc", contents, strict=True):
        (tmp_path / "class").mkdir(exist_ok=True)
        (tmp_path / "class" / f"{name}.jpg").write_bytes(content)
    source = FolderSource(tmp_path)
    (tmp_path / "class" / "a.jpg").unlink()
    files = read_files(source, np.array([2, 0, 1, 2]))
    assert [files.file(row) for row in range(4)] == [b"third file", b"", b"", b"third file"]
    assert [tensor.numpy().tobytes() for tensor in files.tensors()] == [b"third file", b"", b"", b"third file"]
