import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_threads

from megabatch.errors import UserError
from megabatch.nn.batch_norm.groups import new_span_group, span_groups


@given(num_groups=st.integers(1, 50), group_size=st.integers(1, 50))
def test_contiguous_groups_hold_every_rank_once_in_order(num_groups: int, group_size: int) -> None:
    groups = span_groups(num_groups * group_size, group_size)
    assert [rank for group in groups for rank in group] == list(range(num_groups * group_size))
    assert {len(group) for group in groups} == {group_size}


def test_tiles_of_two_by_two_on_a_four_by_four_grid_are_neighbours_on_both_axes() -> None:
    groups = span_groups(16, 4, tiles=(2, 2), grid=(4, 4))
    assert groups == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@given(tiles=st.tuples(st.integers(1, 4), st.integers(1, 4)), across=st.integers(1, 4), down=st.integers(1, 4))
def test_tiles_hold_every_rank_once_and_span_no_more_than_their_shape(
    tiles: tuple[int, int], across: int, down: int
) -> None:
    height, width = tiles
    columns = across * width
    groups = span_groups(down * height * columns, height * width, tiles=tiles, grid=(down * height, columns))
    assert sorted(rank for group in groups for rank in group) == list(range(down * height * columns))
    for group in groups:
        rows, places = {rank // columns for rank in group}, {rank % columns for rank in group}
        assert max(rows) - min(rows) == height - 1
        assert max(places) - min(places) == width - 1


def test_a_row_tile_is_a_contiguous_group() -> None:
    assert span_groups(12, 3, tiles=(1, 3), grid=(4, 3)) == span_groups(12, 3)


@pytest.mark.parametrize(
    ("world_size", "group_size", "options", "advice"),
    [
        (8, 3, {}, "group_size=2 works"),
        (8, 16, {}, "group_size=8 works"),
        (8, 0, {}, "group_size=1 works"),
        (8, 4, {"tiles": (2, 2)}, r"tiles=\(1, 4\), grid=\(2, 4\) works"),
        (8, 4, {"tiles": (3, 1), "grid": (2, 4)}, r"tiles=\(1, 4\), grid=\(2, 4\) works"),
        (8, 4, {"tiles": (4, 1), "grid": (2, 4)}, r"tiles=\(1, 4\), grid=\(2, 4\) works"),
    ],
)
def test_groups_that_do_not_fit_are_refused_with_ones_that_do(
    world_size: int, group_size: int, options: dict[str, tuple[int, int]], advice: str
) -> None:
    with pytest.raises(UserError, match=advice):
        span_groups(world_size, group_size, **options)


def test_each_rank_gets_the_process_group_of_its_tile() -> None:
    def mine() -> list[int]:
        group = new_span_group(2, tiles=(2, 1), grid=(2, 2))
        return dist.get_process_group_ranks(group)

    assert run_threads(4, mine) == [[0, 2], [1, 3], [0, 2], [1, 3]]


def test_groups_of_one_need_no_process_group() -> None:
    assert new_span_group(1) is None
