"""Decoding of whole images and crops, with and without the compiled library; rejection of damaged files."""

import io
import threading

import numpy as np
import pytest
import simplejpeg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from photographs import JPEG_LAYOUTS, encode, photograph, pillow_crop
from PIL import Image
from slow import slow_except

from megabatch.data.jpeg import library
from megabatch.data.jpeg.decode import MAX_PIXELS, decode, decode_crop, image_size
from megabatch.errors import DataError, TooManyPixelsError

MEAN_TOLERANCE = 4.0  # of 255, compared with Pillow's antialiased resize of the full decode


def mean_difference(pixels: np.ndarray, reference: np.ndarray) -> float:
    assert pixels.dtype == np.uint8
    assert pixels.shape == reference.shape
    return float(np.abs(pixels - reference).mean())


# ---- crops equal Pillow's


@pytest.mark.parametrize(("mode", "subsampling"), JPEG_LAYOUTS)
@pytest.mark.parametrize("size", slow_except([224, 96, (40, 61), 9], 96, 9))
def test_a_crop_is_the_antialiased_resize_of_the_full_decode(either, mode, subsampling, size):
    data = encode(photograph(375, 500), mode=mode, quality=90, subsampling=subsampling)
    shape = (size, size) if isinstance(size, int) else size
    for box in [(0, 0, 375, 500), (31, 57, 300, 301), (200, 301, 175, 199), (100, 3, 41, 397)]:
        for channels in (1, 3):
            pixels = decode_crop(data, box=box, size=size, channels=channels)
            assert mean_difference(pixels, pillow_crop(data, box, shape, channels)) < MEAN_TOLERANCE


def test_a_photographs_crop_differs_from_pillows_by_less_than_one_level_on_average(either):
    data = encode(photograph(533, 400), quality=90)
    for box in [(0, 0, 533, 400), (10, 20, 400, 300), (111, 77, 224, 224)]:
        pixels = decode_crop(data, box=box, size=224)
        assert mean_difference(pixels, pillow_crop(data, box, (224, 224), 3)) < 1.0


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_box_of_any_jpeg_gives_pillows_pixels_when_compiled(compiled, data):
    height, width = data.draw(st.integers(16, 200)), data.draw(st.integers(16, 200))
    rows, columns = data.draw(st.integers(8, height)), data.draw(st.integers(8, width))
    box = (data.draw(st.integers(0, height - rows)), data.draw(st.integers(0, width - columns)), rows, columns)
    size = (data.draw(st.integers(8, 150)), data.draw(st.integers(8, 150)))
    options = {"quality": data.draw(st.sampled_from([60, 95])), "subsampling": data.draw(st.sampled_from([0, 1, 2]))}
    options |= data.draw(st.sampled_from([{}, {"optimize": True}, {"restart_marker_rows": 1}, {"progressive": True}]))
    encoded = encode(photograph(height, width, seed=height), **options)
    pixels = decode_crop(encoded, box=box, size=size)
    assert mean_difference(pixels, pillow_crop(encoded, box, size, 3)) < MEAN_TOLERANCE


def colourful(height: int, width: int, kind: str, seed: int) -> np.ndarray:
    """Strong colours that change within few pixels: smooth spots, noise, or cells in black, white and pure colours."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "spots":
        spots = rng.integers(0, 256, (2 + height // 5, 2 + width // 5, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC))
    cells = 255 * rng.integers(0, 2, (1 + height // 3, 1 + width // 3, 3), dtype=np.uint8)
    return np.ascontiguousarray(cells.repeat(3, 0).repeat(3, 1)[:height, :width])


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_a_small_colourful_jpeg_gives_pillows_pixels(either, data):
    height, width = data.draw(st.integers(8, 64)), data.draw(st.integers(8, 64))
    rows, columns = data.draw(st.integers(8, height)), data.draw(st.integers(8, width))
    box = (data.draw(st.integers(0, height - rows)), data.draw(st.integers(0, width - columns)), rows, columns)
    size = (data.draw(st.integers(8, 64)), data.draw(st.integers(8, 64)))
    kind, seed = data.draw(st.sampled_from(["spots", "noise", "cells"])), data.draw(st.integers(0, 99))
    subsampling = data.draw(st.sampled_from(["444", "422", "420", "411", "440", "Gray"]))
    colours = colourful(height, width, kind, seed)
    source = ("GRAY", colours[..., :1].copy()) if subsampling == "Gray" else ("RGB", colours)
    encoded = simplejpeg.encode_jpeg(source[1], data.draw(st.integers(50, 100)), source[0], subsampling)
    assert mean_difference(decode_crop(encoded, box=box, size=size), pillow_crop(encoded, box, size, 3)) < 1.0
    luma = encode(decode(encoded, channels=1)[..., 0], "PNG", mode="L")  # Pillow's is that of clamped colours
    grey = decode_crop(encoded, box=box, size=size, channels=1)
    assert mean_difference(grey, pillow_crop(luma, box, size, 1)) < 1.0


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "411", "440"])
def test_larger_colourful_crops_stay_close_to_pillows(either, subsampling):
    encoded = simplejpeg.encode_jpeg(colourful(270, 240, "spots", 0), 90, "RGB", subsampling)
    for box, size in [((0, 0, 270, 240), (80, 75)), ((11, 7, 200, 210), (29, 30)), ((31, 57, 129, 91), (90, 60))]:
        pixels = decode_crop(encoded, box=box, size=size)
        assert mean_difference(pixels, pillow_crop(encoded, box, size, 3)) < MEAN_TOLERANCE


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 2}])
def test_the_compiled_decoder_supports_every_kind_of_baseline_file(compiled, options):
    for mode, subsampling in JPEG_LAYOUTS:
        data = encode(photograph(120, 90), mode=mode, subsampling=subsampling, **options)
        out = np.empty((50, 60, 3), dtype=np.uint8)
        assert library.crop(data, (11, 7, 100, 80), channels=3, max_pixels=MAX_PIXELS, out=out)
        assert mean_difference(out, pillow_crop(data, (11, 7, 100, 80), (50, 60), 3)) < 2.0


@pytest.mark.parametrize("options", [{"progressive": True}, {"mode": "CMYK"}, {"keep_rgb": True}])
def test_other_jpegs_fall_back_to_libjpeg_turbo(compiled, options):
    data = encode(photograph(60, 60), **options)
    out = np.empty((30, 30, 3), dtype=np.uint8)
    assert not library.crop(data, (0, 0, 60, 60), channels=3, max_pixels=MAX_PIXELS, out=out)
    pixels = decode_crop(data, box=(0, 0, 60, 60), size=30)
    assert mean_difference(pixels, pillow_crop(data, (0, 0, 60, 60), (30, 30), 3)) < MEAN_TOLERANCE


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (8, 8), (3, 64), (17, 33)])
def test_small_images_decode_whole(either, size):
    data = encode(photograph(*size), subsampling=2, quality=95)
    pixels = decode_crop(data, box=(0, 0, *size), size=size)
    assert mean_difference(pixels, decode(data).astype(float)) < MEAN_TOLERANCE


def test_a_flat_image_stays_flat_through_any_resize(either):
    data = encode(np.full((90, 70, 3), 200, dtype=np.uint8), quality=95)
    assert set(np.unique(decode_crop(data, box=(3, 5, 80, 60), size=(33, 129)))) <= {199, 200, 201}


def test_black_and_white_do_not_wrap_around(either):
    stripes = np.repeat(np.array([0, 255], dtype=np.uint8), 32)[None, :, None].repeat(64, 0).repeat(3, 2)
    pixels = decode_crop(encode(stripes, quality=95), box=(0, 0, 64, 64), size=64)
    assert pixels[:, :30].max() <= 3
    assert pixels[:, 34:].min() >= 252


def test_pixels_are_written_into_the_given_buffer(either):
    data = encode(photograph(80, 80))
    batch = np.zeros((3, 32, 32, 3), dtype=np.uint8)
    returned = decode_crop(data, box=(8, 8, 64, 64), size=32, out=batch[1])
    assert np.shares_memory(returned, batch)
    assert np.array_equal(batch[1], decode_crop(data, box=(8, 8, 64, 64), size=32))
    assert not batch[0].any()
    assert not batch[2].any()


def test_the_buffer_may_be_non_contiguous(either):
    data = encode(photograph(80, 80))
    wide = np.zeros((32, 40, 3), dtype=np.uint8)
    decode_crop(data, box=(8, 8, 64, 64), size=32, out=wide[:, 4:36])
    assert np.array_equal(wide[:, 4:36], decode_crop(data, box=(8, 8, 64, 64), size=32))
    assert not wide[:, :4].any()


def test_several_threads_get_the_same_pixels_as_one(either):
    files = [encode(photograph(90, 90, seed), quality=50 + 5 * seed, optimize=seed % 2 == 0) for seed in range(8)]
    alone = [decode_crop(data, box=(5, 5, 80, 80), size=40) for data in files]
    results: dict[int, list[np.ndarray]] = {}

    def work(worker: int) -> None:
        results[worker] = [decode_crop(data, box=(5, 5, 80, 80), size=40) for _ in range(5) for data in files]

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pixels in results.values():
        assert all(np.array_equal(a, b) for a, b in zip(pixels, alone * 5, strict=True))


# ---- other formats


def odd_images() -> dict[str, tuple[bytes, np.ndarray]]:
    """Files of other formats, each with its RGB pixels."""
    rgb = photograph(40, 30)
    grey = rgb[..., 0]
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    palette = Image.fromarray(rgb).quantize(64)
    frames = io.BytesIO()
    palette.save(frames, "GIF", save_all=True, append_images=[Image.new("P", palette.size)])
    see_through = io.BytesIO()
    Image.fromarray(np.dstack([rgb, np.full((40, 30), 9, np.uint8)])).save(see_through, "PNG")
    return {
        "png": (encode(rgb, "PNG"), rgb),
        "16-bit": (buffer.getvalue(), np.repeat(grey[..., None], 3, 2)),
        "animated": (frames.getvalue(), np.asarray(palette.convert("RGB"))),
        "transparent": (see_through.getvalue(), rgb),
        "grey": (
            encode(rgb, "PNG", mode="L"),
            np.repeat(np.asarray(Image.fromarray(rgb).convert("L"))[..., None], 3, 2),
        ),
        "one bit": (encode(np.full((40, 30, 3), 255, np.uint8), "PNG", mode="1"), np.full((40, 30, 3), 255, np.uint8)),
        "webp": (encode(rgb, "WEBP", lossless=True), rgb),
        "bmp": (encode(rgb, "BMP"), rgb),
    }


@pytest.mark.parametrize("kind", sorted(odd_images()))
def test_other_formats_decode_to_rgb(kind):
    data, expected = odd_images()[kind]
    assert image_size(data) == (40, 30)
    assert np.array_equal(decode(data), expected)
    pixels = decode_crop(data, box=(4, 2, 32, 26), size=(16, 13))
    reference = Image.fromarray(expected[4:36, 2:28]).resize((13, 16), Image.Resampling.BILINEAR)
    assert mean_difference(pixels, np.asarray(reference, dtype=np.float64)) < 1.0


def test_a_cmyk_jpeg_becomes_rgb():
    data = encode(photograph(40, 40), mode="CMYK", quality=95)
    assert mean_difference(decode(data), photograph(40, 40).astype(float)) < 8.0


def test_exif_rotation_is_ignored(either):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photograph(20, 60), exif=exif)
    assert image_size(data) == (20, 60)
    assert decode_crop(data, box=(0, 0, 20, 60), size=(20, 60)).shape == (20, 60, 3)


def test_stray_bytes_before_a_marker_are_ignored(either):
    data = encode(photograph(64, 64))
    strayed = data[:20] + b"ab" + data[20:]  # after the first segment
    assert np.array_equal(decode(strayed), decode(data))
    box = (0, 0, 64, 64)
    assert np.array_equal(decode_crop(strayed, box=box, size=32), decode_crop(data, box=box, size=32))


# ---- damage


@pytest.mark.parametrize("length", [0, 1, 2, 3, 20, 300, 1500, -2, -1])
def test_a_truncated_jpeg_is_rejected_for_any_crop(either, length):
    data = encode(photograph(100, 100))[:length]
    with pytest.raises(DataError):
        decode(data)
    with pytest.raises(DataError):
        decode_crop(data, box=(0, 0, 8, 8), size=8)


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_files_of_other_formats_are_rejected(format):
    data = encode(photograph(50, 50), format)
    with pytest.raises(DataError, match=r"damaged|not an image"):
        decode(data[: len(data) // 2])


def test_an_end_marker_appended_to_a_truncated_jpeg_does_not_hide_damage_in_the_crop(either):
    data = encode(photograph(100, 100))
    with pytest.raises(DataError, match="damaged"):
        decode_crop(data[: len(data) // 2] + b"\xff\xd9", box=(0, 0, 100, 100), size=50)


def test_a_file_that_is_not_an_image_is_rejected_with_the_reason():
    with pytest.raises(DataError, match="empty"):
        decode(b"")
    with pytest.raises(DataError, match="not an image"):
        decode(b"hello, this is text" * 10)


def test_an_image_above_the_pixel_limit_is_rejected_by_its_header(either):
    data = encode(photograph(64, 64))
    with pytest.raises(TooManyPixelsError, match=r"absurdly large.*max_pixels=1000"):
        decode_crop(data, box=(0, 0, 8, 8), size=8, max_pixels=1000)
    with pytest.raises(DataError, match="absurdly large"):
        decode(data, max_pixels=1000)


def test_a_decompression_bomb_is_rejected_without_being_decompressed():
    bomb = encode(np.zeros((12_000, 12_000), dtype=np.uint8), "PNG", mode="1")
    assert len(bomb) < 100_000
    with pytest.raises(TooManyPixelsError, match="absurdly large"):
        decode(bomb)


@pytest.mark.parametrize("box", [(-1, 0, 8, 8), (0, 0, 65, 8), (0, 60, 8, 5), (0, 0, 0, 8)])
def test_a_box_outside_the_image_is_rejected(either, box):
    with pytest.raises(DataError, match="box"):
        decode_crop(encode(photograph(64, 64)), box=box, size=8)


def test_invalid_channels_size_or_buffer_are_rejected(either):
    data = encode(photograph(64, 64))
    with pytest.raises(DataError, match="channels=2"):
        decode_crop(data, box=(0, 0, 8, 8), size=8, channels=2)
    with pytest.raises(DataError, match="at least 1 x 1"):
        decode_crop(data, box=(0, 0, 8, 8), size=0)
    with pytest.raises(DataError, match="must be"):
        decode_crop(data, box=(0, 0, 8, 8), size=8, out=np.empty((8, 8, 3), dtype=np.float32))
