from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabatch.data.loading.order import check_split, micro_batches
from megabatch.errors import SettingsError


@st.composite
def splits(draw: st.DrawFn) -> dict[str, int]:
    """Global batches with a valid span, micro-batch and number of workers; the last span may be short."""
    bn_span = draw(st.integers(1, 24))
    if draw(st.booleans()):
        micro_batch_size, groups = bn_span * draw(st.integers(1, 4)), draw(st.integers(1, 9))
        group_size = 1
    else:
        micro_batch_size = draw(st.sampled_from([d for d in range(1, bn_span + 1) if bn_span % d == 0]))
        group_size, groups = bn_span // micro_batch_size, draw(st.integers(1, 4))
    return {
        "first": draw(st.integers(0, 10**9)),
        "count": draw(st.integers(1, 200)),
        "world_size": group_size * groups,
        "micro_batch_size": micro_batch_size,
        "bn_span": bn_span,
    }


def all_ranks(split: dict[str, int]) -> list[list[range]]:
    return [micro_batches(**split, rank=rank) for rank in range(split["world_size"])]


@settings(max_examples=300, deadline=None)
@given(split=splits())
def test_the_ranks_together_process_each_position_once(split):
    seen = [p for ranges in all_ranks(split) for positions in ranges for p in positions]
    assert sorted(seen) == list(range(split["first"], split["first"] + split["count"]))


@settings(max_examples=300, deadline=None)
@given(split=splits())
def test_no_micro_batch_is_larger_than_allowed_and_each_rank_s_positions_ascend(split):
    for ranges in all_ranks(split):
        assert all(len(positions) <= split["micro_batch_size"] for positions in ranges)
        flat = [p for positions in ranges for p in positions]
        assert flat == sorted(flat)


@settings(max_examples=300, deadline=None)
@given(split=splits())
def test_a_span_lies_in_one_micro_batch_or_in_the_same_micro_batch_of_one_group(split):
    places: dict[int, set[tuple[int, int]]] = {}
    for rank, ranges in enumerate(all_ranks(split)):
        for index, positions in enumerate(ranges):
            for p in positions:
                places.setdefault((p - split["first"]) // split["bn_span"], set()).add((rank, index))
    group_size = max(1, split["bn_span"] // split["micro_batch_size"])
    for where in places.values():
        groups = {rank // group_size for rank, _ in where}
        indices = {index for _, index in where}
        assert len(groups) == len(indices) == 1
        if group_size == 1:
            assert len(where) == 1


@settings(max_examples=300, deadline=None)
@given(split=splits())
def test_work_is_balanced(split):
    group_size = max(1, split["bn_span"] // split["micro_batch_size"])
    ranks = all_ranks(split)
    spans_of_group = Counter()
    for group in range(split["world_size"] // group_size):
        members = ranks[group * group_size : (group + 1) * group_size]
        assert len({len(ranges) for ranges in members}) == 1
        spans_of_group[group] = -(-sum(len(r) for ranges in members for r in ranges) // split["bn_span"])
        for index in zip(*members, strict=True):
            assert max(map(len, index)) - min(map(len, index)) <= 1
    assert max(spans_of_group.values()) - min(spans_of_group.values()) <= 1


def test_eight_spans_on_three_ranks_are_three_three_two():
    ranges = [micro_batches(100, 32, rank=rank, world_size=3, micro_batch_size=8, bn_span=4) for rank in range(3)]
    assert ranges == [
        [range(100, 108), range(108, 112)],
        [range(112, 120), range(120, 124)],
        [range(124, 132)],
    ]


def test_two_ranks_share_each_span_of_twice_the_micro_batch():
    ranges = [micro_batches(0, 16, rank=rank, world_size=4, micro_batch_size=2, bn_span=4) for rank in range(4)]
    assert ranges[0] == [range(2), range(4, 6)]
    assert ranges[1] == [range(2, 4), range(6, 8)]
    assert ranges[2] == [range(8, 10), range(12, 14)]
    assert ranges[3] == [range(10, 12), range(14, 16)]


def test_a_last_span_of_one_sample_gives_the_other_ranks_of_the_group_an_empty_range():
    ranges = [micro_batches(0, 5, rank=rank, world_size=2, micro_batch_size=2, bn_span=4) for rank in range(2)]
    assert [[len(r) for r in rank] for rank in ranges] == [[2, 1], [2, 0]]


def test_ranks_without_a_span_in_the_last_batch_get_an_empty_list():
    ranges = [micro_batches(0, 3, rank=rank, world_size=3, micro_batch_size=2, bn_span=2) for rank in range(3)]
    assert ranges == [[range(2)], [range(2, 3)], []]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"micro_batch_size": 12, "bn_span": 8, "world_size": 1}, "12 is not a multiple of bn_span=8; 8 works"),
        ({"micro_batch_size": 6, "bn_span": 8, "world_size": 1}, "6 does not divide bn_span=8; 4 does"),
        ({"micro_batch_size": 0, "bn_span": 8, "world_size": 1}, "must be at least 1; 8 works"),
        ({"micro_batch_size": 2, "bn_span": 8, "world_size": 6}, "groups of 4 workers.*micro_batch_size=8 works"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_a_size_that_works(sizes, message):
    with pytest.raises(SettingsError, match=message):
        micro_batches(0, 32, rank=0, **sizes)


@settings(deadline=None)
@given(split=splits())
def test_a_full_batch_is_refused_exactly_if_some_rank_has_no_work(split):
    idle = any(not ranges for ranges in all_ranks(split))
    arguments = {k: split[k] for k in ("world_size", "micro_batch_size", "bn_span")}
    if not idle:
        check_split(global_batch_size=split["count"], **arguments)
        return
    with pytest.raises(SettingsError, match="workers have work") as refusal:
        check_split(global_batch_size=split["count"], **arguments)
    workers = int(str(refusal.value).rsplit(";", 1)[1].split()[0])
    check_split(global_batch_size=split["count"], **{**arguments, "world_size": workers})
