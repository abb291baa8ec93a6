"""How the rows of a 1x1 convolution are divided among programs: few partial sums, and no long queue."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megabatch.kernels.bottleneck import tiles
from megabatch.kernels.bottleneck.conv1x1 import FORWARD_TILINGS
from megabatch.kernels.bottleneck.tiles import part_cut


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_resident_programs", lambda _: 264)


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize(("channels", "pixels"), [(64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)])
@pytest.mark.parametrize("tiling", FORWARD_TILINGS)
def test_a_batch_of_1024_leaves_at_most_264_partial_sums_a_channel(
    channels: int, pixels: int, tiling: tiles.Tiling
) -> None:
    images = torch.empty(1024, channels, pixels, pixels, device="meta")
    across = -(-channels // tiling.outputs)
    cut = part_cut(images, 1024, tiling, across)
    assert cut.parts <= 264
    assert (cut.parts - 1) * cut.rows_per_part < cut.num_rows <= cut.parts * cut.rows_per_part
    rows_of_the_longest = -(-cut.parts * across // 264) * cut.rows_per_part
    assert rows_of_the_longest * 264 < 1.06 * cut.num_rows * across


@given(st.integers(1, 3000), st.integers(1, 700), st.sampled_from([2, 216, 264]))
def test_parts_cover_a_span_and_finish_no_later_than_one_part_or_one_per_program(
    num_tiles: int, side_by_side: int, resident: int
) -> None:
    per_part = tiles._tiles_per_part(num_tiles, side_by_side, resident)
    parts = -(-num_tiles // per_part)
    assert 1 <= parts <= resident

    def longest_queue(parts: int) -> int:
        return -(-parts * side_by_side // resident) * -(-num_tiles // parts)

    assert longest_queue(parts) <= min(longest_queue(1), longest_queue(min(num_tiles, resident)))
