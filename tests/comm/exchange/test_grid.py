"""The choice of rows: hosts if they are known, else near-square; errors where nothing fits."""

import inspect

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_threads

from megabatch.comm.exchange.grid import Grid, choose_rows, make_grid
from megabatch.errors import SettingsError


@given(num_hosts=st.integers(2, 6), ranks_per_host=st.integers(2, 6), data=st.data())
def test_ranks_of_a_host_form_a_row_for_any_order_of_ranks(num_hosts, ranks_per_host, data):
    hosts = data.draw(st.permutations([f"h{i}" for i in range(num_hosts)] * ranks_per_host))
    rows, why = choose_rows(len(hosts), hosts=hosts)
    assert why == "rows are hosts"
    assert all(len({hosts[rank] for rank in row}) == 1 and len(row) == ranks_per_host for row in rows)
    assert sorted(rank for row in rows for rank in row) == list(range(len(hosts)))


@given(world_size=st.integers(1, 200), shape=st.booleans())
def test_every_world_gets_a_grid_that_holds_each_rank_once(world_size, shape):
    rows, why = choose_rows(world_size, shape=(1, world_size) if shape else None)
    assert sorted(rank for row in rows for rank in row) == list(range(world_size))
    assert len({len(row) for row in rows}) == 1
    assert why


@pytest.mark.parametrize(("world_size", "side"), [(16, 4), (12, 3), (8, 2), (6, 2), (7, 1)])
def test_without_hosts_the_row_length_is_the_largest_divisor_up_to_the_root(world_size, side):
    rows, _ = choose_rows(world_size)
    assert len(rows[0]) == side


def test_a_prime_world_is_one_column():
    assert choose_rows(7) == ([[rank] for rank in range(7)], "7 ranks do not form rows: one column")


def test_local_world_size_makes_blocks_of_ranks_rows():
    assert choose_rows(8, local_world_size=4)[0] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_uneven_hosts_are_cut_into_rows_of_their_common_divisor():
    rows, why = choose_rows(6, hosts=["a", "a", "b", "b", "b", "b"])
    assert rows == [[0, 1], [2, 3], [4, 5]]
    assert "differ" in why


def test_a_given_shape_keeps_the_ranks_of_a_host_together():
    assert choose_rows(4, shape=(2, 2), hosts=["a", "b", "a", "b"])[0] == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world_size": 8, "shape": (3, 2)}, r"3 x 2 does not hold 8 ranks.*\(2, 4\)"),
        ({"world_size": 7, "local_world_size": 2}, r"not a whole number of hosts.*\(1, 7\)"),
        ({"world_size": 3, "hosts": ["a", "b"]}, "2 host names for 3 ranks"),
    ],
)
def test_an_impossible_grid_is_an_error_with_a_value_that_works(arguments, message):
    with pytest.raises(SettingsError, match=message):
        choose_rows(**arguments)


@pytest.mark.parametrize("rows", [[[0, 1], [2]], [[0, 1], [1, 2]], []])
def test_rows_must_be_equally_long_and_hold_every_rank_once(rows):
    with pytest.raises(SettingsError, match="equally long"):
        Grid(rows, rank=0)


def test_a_rank_outside_the_grid_is_an_error():
    with pytest.raises(SettingsError, match="rank 5 is not in the grid"):
        _ = Grid([[0, 1]], rank=5).position


def places_by_group():
    """Sum of ranks along each axis; True per axis if this rank has its index in the group."""
    grid = make_grid(hosts=["a", "b", "b", "a"])  # column (1, 3) would be (3, 1): ranks out of order
    sums = [sum(dist.get_process_group_ranks(grid.group(axis))) for axis in ("row", "column")]
    own = [dist.get_rank(grid.group(axis)) == grid.index(axis) for axis in ("row", "column")]
    return sums, own


@pytest.mark.skipif(
    "sort_ranks" not in inspect.signature(dist.new_group).parameters, reason="torch before 2.13 sorts a group's ranks"
)
def test_groups_agree_with_the_rows_for_scattered_hosts():
    results = run_threads(4, places_by_group)
    assert [sums for sums, _ in results] == [[3, 1], [3, 1], [3, 5], [3, 5]]
    assert all(all(own) for _, own in results)


def test_a_grid_can_be_made_before_the_process_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert make_grid(shape=(2, 3)).rows == ((0, 1), (2, 3), (4, 5))
    with pytest.raises(SettingsError, match=r"no process group; shape=\(2, 2\) or world_size=4 works"):
        make_grid()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert make_grid().shape == (2, 2)


def index_in_a_grid(grid):
    return grid.position, grid.index("column")


def test_a_grid_that_was_made_early_finds_its_rank_later():
    grids = [make_grid(shape=(2, 2)) for _ in range(4)]
    assert run_threads(4, lambda: index_in_a_grid(grids[dist.get_rank()])) == [
        ((0, 0), 0),
        ((1, 0), 0),
        ((0, 1), 1),
        ((1, 1), 1),
    ]


def test_a_grid_of_more_ranks_than_the_job_is_refused_at_its_first_group():
    grid = make_grid(shape=(2, 2))

    def group():
        try:
            return grid.group("world")
        except SettingsError as error:
            return str(error)

    assert run_threads(2, group) == ["the grid holds rank 3, and the job has 2 ranks; make_grid() after it fits"] * 2
