import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabatch.data.augment import crops

SIZES = st.integers(1, 600)


def boxes_of(height: int, width: int, count: int, **bounds: float) -> np.ndarray:
    return crops.random_resized_crop_boxes(
        np.full(count, height),
        np.full(count, width),
        seed=1,
        epochs=np.zeros(count, dtype=np.int64),
        samples=np.arange(count),
        **bounds,
    )


@settings(deadline=None)
@given(height=SIZES, width=SIZES)
def test_random_resized_crops_lie_inside_the_image(height, width):
    top, left, rows, columns = boxes_of(height, width, 50).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (rows >= 1).all()
    assert (columns >= 1).all()
    assert (top + rows <= height).all()
    assert (left + columns <= width).all()


def test_area_is_uniform_and_aspect_log_uniform_where_every_draw_fits():
    _, _, rows, columns = boxes_of(2000, 2000, 50_000, min_area=0.1, max_area=0.5).T
    area, log_aspect = rows * columns / 2000**2, np.log(columns / rows)
    for values, low, high in ((area, 0.1, 0.5), (log_aspect, math.log(3 / 4), math.log(4 / 3))):
        fractions = (values - low) / (high - low)
        assert fractions.min() > -0.01
        assert fractions.max() < 1.01
        counts, _ = np.histogram(fractions, bins=20, range=(0, 1))
        expected = counts.sum() / 20
        assert ((counts - expected) ** 2 / expected).sum() < 19 + 6 * math.sqrt(38)
    assert abs(np.corrcoef(area, log_aspect)[0, 1]) < 5 / math.sqrt(50_000)


def test_the_position_of_a_crop_is_uniform_over_all_that_fit():
    top, left, rows, columns = boxes_of(64, 64, 50_000).T
    for start, size in ((top, rows), (left, columns)):
        # Each of the (64 - size + 1) positions is equally likely, so their midpoints are uniform in [0, 1].
        fractions = (start + 0.5) / (64 - size + 1)
        assert fractions.mean() == pytest.approx(0.5, abs=5 * 0.29 / math.sqrt(50_000))


def reference_box(height: int, width: int, draws: list[tuple[float, float]], place: tuple[float, float]) -> list[int]:
    """Ten attempts, then the central crop; one image, in scalar arithmetic."""
    for area_draw, aspect_draw in draws:
        area = (0.08 + 0.92 * area_draw) * height * width
        aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * aspect_draw)
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            return [int(place[0] * (height - rows + 1)), int(place[1] * (width - columns + 1)), rows, columns]
    ratio = width / height
    if ratio < 3 / 4:
        columns, rows = width, round(width / (3 / 4))
    elif ratio > 4 / 3:
        columns, rows = round(height * 4 / 3), height
    else:
        columns, rows = width, height
    return [(height - rows) // 2, (width - columns) // 2, rows, columns]


@settings(deadline=None)
@given(height=st.integers(20, 400), width=st.integers(20, 400), sample=st.integers(0, 2**40), epoch=st.integers(0, 99))
def test_boxes_equal_ten_attempts_then_the_central_crop_computed_one_by_one(height, width, sample, epoch):
    def draw(stream: int) -> float:
        return float(crops.uniform(3, epoch, sample, stream))

    stream = crops.Stream
    draws = [(draw(stream.CROP_AREA + i), draw(stream.CROP_ASPECT + i)) for i in range(10)]
    expected = reference_box(height, width, draws, (draw(stream.CROP_TOP), draw(stream.CROP_LEFT)))
    one = crops.random_resized_crop_boxes(
        np.array([height]), np.array([width]), seed=3, epochs=np.array([epoch]), samples=np.array([sample])
    )
    assert one[0].tolist() == expected


@pytest.mark.parametrize(("height", "width"), [(500, 3), (3, 500), (400, 20)])
def test_if_no_draw_fits_the_box_is_central_with_the_nearest_allowed_aspect(height, width):
    top, left, rows, columns = boxes_of(height, width, 20, min_area=0.9).T
    aspect = 0.75 if height > width else 4 / 3
    expected = (min(height, round(width / aspect)), min(width, round(height * aspect)))
    assert {(int(r), int(c)) for r, c in zip(rows, columns, strict=True)} == {expected}
    assert set(top) == {(height - expected[0]) // 2}
    assert set(left) == {(width - expected[1]) // 2}


def test_images_of_different_sizes_in_one_batch_get_the_boxes_they_get_alone():
    heights, widths = np.array([30, 400, 77, 10]), np.array([50, 20, 78, 10])
    epochs, samples = np.array([0, 1, 0, 5]), np.array([9, 8, 7, 6])
    together = crops.random_resized_crop_boxes(heights, widths, seed=2, epochs=epochs, samples=samples)
    for i in range(4):
        part = slice(i, i + 1)
        alone = crops.random_resized_crop_boxes(
            heights[part], widths[part], seed=2, epochs=epochs[part], samples=samples[part]
        )
        assert together[i].tolist() == alone[0].tolist()


def test_the_center_box_is_224_of_256_of_the_shorter_side():
    boxes = crops.center_boxes(np.array([256, 512, 100]), np.array([300, 256, 100]), crop_ratio=0.875)
    assert boxes.tolist() == [[16, 38, 224, 224], [144, 16, 224, 224], [6, 6, 88, 88]]


def test_random_shifts_cover_every_offset_equally():
    samples = np.arange(81_000)
    rows, columns = crops.random_shifts(4, seed=0, epochs=np.zeros_like(samples), samples=samples)
    counts = np.bincount((rows + 4) * 9 + columns + 4, minlength=81)
    assert counts.size == 81
    assert ((counts - 1000) ** 2 / 1000).sum() < 80 + 5 * math.sqrt(160)


def test_squares_at_the_border_are_clipped():
    sides, tops, lefts = np.array([4.0, 4.0, 0.0]), np.array([0.0, 0.5, 0.5]), np.array([0.99, 0.5, 0.5])
    assert crops.square_boxes(sides, 10, tops, lefts).tolist() == [[0, 7, 2, 10], [3, 3, 7, 7], [5, 5, 5, 5]]
