import itertools
import tracemalloc
from collections import Counter
from math import factorial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabatch.data.loading.order import SHARD_WINDOW, permute, shards_ahead, shards_at_once, stream_samples
from megabatch.errors import DataError

SEED = st.integers(0, 2**63)


@settings(deadline=None)
@given(num_samples=st.integers(1, 3000), seed=SEED, epoch=st.integers(0, 10**6))
def test_every_epoch_is_a_permutation_of_the_samples(num_samples, seed, epoch):
    order = permute(np.arange(num_samples), num_samples=num_samples, seed=seed, epoch=epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(num_samples))


@settings(deadline=None)
@given(num_samples=st.integers(2, 10**6), seed=SEED, data=st.data())
def test_a_position_s_sample_does_not_depend_on_the_other_positions_of_the_call(num_samples, seed, data):
    pairs = data.draw(
        st.lists(st.tuples(st.integers(0, num_samples - 1), st.integers(0, 1000)), min_size=1, max_size=9)
    )
    positions, epochs = np.array(pairs).T
    together = permute(positions, num_samples=num_samples, seed=seed, epoch=epochs)
    alone = [int(permute(np.array([p]), num_samples=num_samples, seed=seed, epoch=e)[0]) for p, e in pairs]
    assert together.tolist() == alone


@pytest.mark.parametrize("num_samples", [3, 4, 5, 6])
def test_all_orders_of_a_few_samples_are_equally_likely(num_samples):
    num_epochs = 20_000
    epochs = np.repeat(np.arange(num_epochs), num_samples)
    places = np.tile(np.arange(num_samples), num_epochs)
    orders = permute(places, num_samples=num_samples, seed=11, epoch=epochs).reshape(num_epochs, num_samples)
    counts = Counter(map(tuple, orders.tolist()))
    expected, degrees = num_epochs / factorial(num_samples), factorial(num_samples) - 1
    statistic = sum((n - expected) ** 2 / expected for n in counts.values())
    assert len(counts) == factorial(num_samples)
    assert abs(statistic - degrees) < 5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("num_samples", [1000, 60_000, 1_281_167])
def test_the_sample_at_a_place_is_uniform_and_independent_of_its_neighbours(num_samples):
    places = np.arange(num_samples)[:60_000]
    here = permute(places, num_samples=num_samples, seed=5, epoch=1)
    cell = here * 8 // num_samples
    neighbours = np.bincount(cell[:-1] * 8 + cell[1:], minlength=64)
    next_epoch = permute(places, num_samples=num_samples, seed=5, epoch=2) * 8 // num_samples
    epochs = np.bincount(cell * 8 + next_epoch, minlength=64)
    for counts in (neighbours, epochs):
        expected = counts.sum() / 64
        assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * np.sqrt(2 * 63)


def test_a_shuffle_leaves_one_sample_in_place_on_average():
    fixed = [(permute(np.arange(500), num_samples=500, seed=1, epoch=e) == np.arange(500)).sum() for e in range(400)]
    assert np.mean(fixed) == pytest.approx(1, abs=5 / np.sqrt(400))


def test_seeds_and_epochs_give_different_orders():
    orders = {
        tuple(permute(np.arange(50), num_samples=50, seed=s, epoch=e).tolist()) for s in range(10) for e in range(10)
    }
    assert len(orders) == 100


def test_memory_does_not_grow_with_the_number_of_samples():
    tracemalloc.start()
    _, samples = stream_samples(5 * 10**11, 1024, num_samples=2**40 - 87, seed=3)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1_000_000
    assert len(set(samples.tolist())) == 1024
    assert samples.min() >= 0
    assert samples.max() < 2**40 - 87


def test_positions_outside_the_epoch_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.9; got 3\.\.10"):
        permute(np.array([3, 10]), num_samples=10, seed=0, epoch=0)


def shard_size_lists() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(lambda sizes: sum(sizes) > 0)


@settings(max_examples=200, deadline=None)
@given(
    sizes=shard_size_lists(),
    in_shards=st.booleans(),
    shuffle=st.booleans(),
    seed=SEED,
    batch=st.integers(1, 40),
    window=st.integers(1, 5),
)
def test_any_split_of_the_stream_gives_each_sample_once_per_epoch(sizes, in_shards, shuffle, seed, batch, window):
    num_samples, num_epochs = sum(sizes), 3
    seen: list[tuple[int, int]] = []
    for first in range(0, num_epochs * num_samples, batch):
        count = min(batch, num_epochs * num_samples - first)
        epochs, samples = stream_samples(
            first,
            count,
            num_samples=num_samples,
            seed=seed,
            shuffle=shuffle,
            shard_sizes=sizes if in_shards else None,
            shard_window=window,
        )
        seen += zip(epochs.tolist(), samples.tolist(), strict=True)
    assert [epoch for epoch, _ in seen] == sorted(epoch for epoch, _ in seen)
    assert sorted(seen) == [(epoch, sample) for epoch in range(num_epochs) for sample in range(num_samples)]


def test_shard_local_order_reads_at_most_one_window_of_shards_at_a_time():
    sizes = [10, 7, 0, 13, 9, 11, 8, 12, 10, 6]
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    _, samples = stream_samples(0, sum(sizes), num_samples=sum(sizes), seed=4, shard_sizes=sizes, shard_window=3)
    visits = shard_of[samples]
    first, last = {}, {}
    for place, shard in enumerate(visits):
        first.setdefault(int(shard), place)
        last[int(shard)] = place
    open_shards = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(visits))]
    assert max(open_shards) <= 3
    assert len({*visits[:10].tolist()}) > 1  # the window is shuffled, not read shard after shard


@pytest.mark.slow
def test_as_many_consecutive_samples_as_the_smallest_window_holds_lie_in_two_windows():
    sizes = [5, 2, 7, 3, 4, 9, 2, 6, 8, 1, 5, 5]
    smallest = 1 + 2 + 2 + 3
    assert shards_at_once(smallest, num_workers=3, shard_sizes=sizes) == 2 * SHARD_WINDOW
    assert shards_at_once(smallest + 1, num_workers=3, shard_sizes=sizes) == 3 * 2 * SHARD_WINDOW
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    for seed, first in itertools.product(range(20), range(2 * sum(sizes))):
        _, samples = stream_samples(first, smallest, num_samples=sum(sizes), seed=seed, shard_sizes=sizes)
        pair = shards_ahead(first, shard_sizes=sizes, seed=seed)
        assert set(shard_of[samples].tolist()) <= set(pair)
        assert len(pair) == 2 * SHARD_WINDOW


def test_shard_local_windows_are_shuffled_differently():
    _, samples = stream_samples(0, 800, num_samples=800, seed=1, shard_sizes=[20] * 40, shard_window=2)
    within = samples.reshape(20, 40) % 20
    assert len({tuple(row) for row in within.tolist()}) == 20


def test_without_shuffle_samples_come_in_index_order():
    epochs, samples = stream_samples(8, 5, num_samples=10, seed=0, shuffle=False)
    assert epochs.tolist() == [0, 0, 1, 1, 1]
    assert samples.tolist() == [8, 9, 0, 1, 2]


def test_an_empty_range_has_no_samples():
    epochs, samples = stream_samples(7, 0, num_samples=10, seed=0)
    assert len(epochs) == len(samples) == 0


def test_shard_sizes_with_another_sum_are_refused():
    with pytest.raises(DataError, match="sum to 9 samples, the data set holds 10"):
        stream_samples(0, 5, num_samples=10, seed=0, shard_sizes=[4, 5])


def test_a_data_set_without_samples_is_refused():
    with pytest.raises(DataError, match="no samples"):
        stream_samples(0, 5, num_samples=0, seed=0)
