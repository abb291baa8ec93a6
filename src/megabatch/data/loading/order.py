"""The sample at each position of the infinite training stream, and the positions that each rank processes.

Position p of the stream belongs to epoch p // n and is place p % n of that epoch's permutation of n samples. The
permutation is computed, not stored: any worker can evaluate any position of any epoch, in constant memory.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megabatch.data.augment.hashing import GOLDEN, Integers, Stream, UInt64, as_words, mix_bits, random_words
from megabatch.data.loading.split import check_split, micro_batches
from megabatch.errors import DataError

__all__ = [
    "SHARD_WINDOW",
    "check_split",
    "micro_batches",
    "permute",
    "shards_ahead",
    "shards_at_once",
    "stream_samples",
]

Int64 = NDArray[np.int64]

SHARD_WINDOW = 4  # number of shards that the shard-local order shuffles together
_ROUNDS = 10
_ROUNDS_OF_SMALL_DOMAINS = 24  # halves of a few bits mix slowly; 24 rounds make all orders of 5 samples equally likely


def permute(
    positions: NDArray[np.integer], *, num_samples: int, seed: int, epoch: Integers, stream: int = Stream.ORDER
) -> Int64:
    """Sample at each position of an epoch, [n] int64: a permutation of 0..num_samples-1 for every (seed, epoch).

    A Feistel network with two halves of nearly equal width permutes the next power of two. Results of `num_samples`
    or more are permuted again until they are below it ("cycle walking", Black and Rogaway 2002), which takes fewer
    than two passes on average. Stateless, in constant memory.

    Args:
        positions: places in the epoch, [n], each in 0..num_samples-1.
        epoch: one number, or one per position.
        stream: purpose of the permutation, so that different orders with one seed are independent.

    Raises:
        ValueError: a position outside the epoch.
    """
    positions = np.asarray(positions)
    if positions.size and not (positions.min() >= 0 and positions.max() < num_samples):
        raise ValueError(f"positions must be in 0..{num_samples - 1}; got {positions.min()}..{positions.max()}")
    if num_samples < 2:
        return positions.astype(np.int64)
    bits = max(2, (num_samples - 1).bit_length())
    key = random_words(seed, epoch, num_samples, stream)
    values = _feistel(as_words(positions), key, bits)
    outside = np.flatnonzero(values >= num_samples)
    while outside.size:
        walked = _feistel(values[outside], key[outside] if key.ndim else key, bits)
        values[outside] = walked
        outside = outside[walked >= num_samples]
    return values.astype(np.int64)


def _feistel(values: UInt64, key: UInt64, bits: int) -> UInt64:
    """Bijection of 0..2^bits-1: XORs each half in turn with a keyed hash of the other; the widths may differ by 1."""
    low_bits = np.uint64(bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(bits - bits // 2)) - np.uint64(1)
    low, high = values & low_mask, values >> low_bits
    for round_key in _round_keys(key, _ROUNDS_OF_SMALL_DOMAINS if bits <= 10 else _ROUNDS):
        low, high = high, low ^ (mix_bits(round_key + high) & low_mask)
        low_mask, high_mask = high_mask, low_mask
    # The number of rounds is even, so `low` and `high` again have their original widths.
    joined: UInt64 = (high << low_bits) | low
    return joined


def _round_keys(key: UInt64, num_rounds: int) -> list[UInt64]:
    with np.errstate(over="ignore"):
        return [mix_bits(key + as_words(r + 1) * GOLDEN) for r in range(num_rounds)]


def stream_samples(
    first: int,
    count: int,
    *,
    num_samples: int,
    seed: int,
    shuffle: bool = True,
    shard_sizes: Sequence[int] | None = None,
    shard_window: int = SHARD_WINDOW,
) -> tuple[Int64, Int64]:
    """Epochs and sample indices, [count] int64 each, of the stream positions `first` .. `first + count - 1`.

    The positions may span several epochs. With `shard_sizes` (samples per shard, in index order) the shuffle is
    shard-local, for storage on which only sequential reads are fast: shards come in a permuted order, and samples are
    permuted within each window of `shard_window` consecutive shards of that order. In either order, each sample comes
    exactly once per epoch.

    Raises:
        DataError: no samples, or shard sizes whose sum is not `num_samples`.
    """
    if num_samples < 1:
        raise DataError("the data set holds no samples; at least 1 is needed")
    stream = np.arange(first, first + count, dtype=np.int64)
    epochs, places = np.divmod(stream, num_samples)
    if not shuffle or not count:
        return epochs, places
    if shard_sizes is not None:
        order = _shard_local(places, epochs, tuple(shard_sizes), seed=seed, window=shard_window, total=num_samples)
        return epochs, order
    # One key for all positions is faster than one per position; most batches lie in one epoch.
    epoch: Integers = epochs if epochs[0] != epochs[-1] else int(epochs[0])
    return epochs, permute(places, num_samples=num_samples, seed=seed, epoch=epoch)


def shards_ahead(first: int, *, shard_sizes: Sequence[int], seed: int, num_windows: int = 2) -> list[int]:
    """Returns the shards that the shard-local order reads from stream position `first` on, in reading order.

    They belong to `num_windows` windows: that of the position and those after it, continuing into the next epoch at
    the end of one. Empty shards are left out.
    """
    sizes, shards = tuple(shard_sizes), list[int]()
    epoch, place = divmod(first, sum(sizes))
    for _ in range(num_windows):
        read, place = _ShardEpoch.of(sizes, seed, epoch, SHARD_WINDOW).window_at(place)
        shards += [shard for shard in read if sizes[shard]]
        if place == sum(sizes):
            epoch, place = epoch + 1, 0
    return shards


def shards_at_once(num_samples: int, *, num_workers: int, shard_sizes: Sequence[int]) -> int:
    """Number of shards that a cache must hold for `num_workers` that share `num_samples` consecutive samples.

    Two windows are in use at a time: the one that is read, and the next one, which is prefetched. If the samples fit
    the smallest possible window, one pair of windows serves all workers. Otherwise each worker may read a different
    window, and workers that shared one pair would evict each other's shards and fetch them again.
    """
    smallest = sum(sorted(shard_sizes)[:SHARD_WINDOW])
    return 2 * SHARD_WINDOW * (1 if num_samples <= smallest else num_workers)


def _shard_local(
    places: Int64, epochs: Int64, shard_sizes: tuple[int, ...], *, seed: int, window: int, total: int
) -> Int64:
    if sum(shard_sizes) != total:
        raise DataError(f"shard sizes sum to {sum(shard_sizes)} samples, the data set holds {total}")
    samples = np.empty_like(places)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        samples[inside] = _ShardEpoch.of(shard_sizes, seed, int(epoch), window).samples(places[inside])
    return samples


class _ShardEpoch:
    """Order of the shards in one epoch: where each shard starts in the epoch, and in the data set."""

    def __init__(self, shard_sizes: tuple[int, ...], seed: int, epoch: int, window: int) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        slots = np.arange(len(sizes), dtype=np.int64)
        shards = permute(slots, num_samples=len(sizes), seed=seed, epoch=epoch, stream=Stream.SHARD_ORDER)
        self._seed, self._epoch, self._window = seed, epoch, window
        self._shards = shards
        self._index_start = (np.cumsum(sizes) - sizes)[shards]
        self._place_start = np.concatenate([[0], np.cumsum(sizes[shards])])

    @staticmethod
    @lru_cache(maxsize=4)
    def of(shard_sizes: tuple[int, ...], seed: int, epoch: int, window: int) -> "_ShardEpoch":
        """Cached constructor: consecutive batches need the same one or two epochs."""
        return _ShardEpoch(shard_sizes, seed, epoch, window)

    def samples(self, places: Int64) -> Int64:
        """Sample index at each place of the epoch."""
        windows = self._slot(places) // self._window
        shuffled = np.empty_like(places)
        for window in np.unique(windows):
            inside = windows == window
            shuffled[inside] = self._within_window(places[inside], int(window))
        slots = self._slot(shuffled)
        samples: Int64 = self._index_start[slots] + shuffled - self._place_start[slots]
        return samples

    def window_at(self, place: int) -> tuple[list[int], int]:
        """Shards of the window that contains a place, and the place after the window's last."""
        start = int(self._slot(np.asarray(place))) // self._window * self._window
        shards = self._shards[start : start + self._window]
        return shards.tolist(), int(self._place_start[start + len(shards)])

    def _slot(self, places: Int64) -> Int64:
        """Position, in the epoch's order of shards, of the shard that contains each place; skips empty shards."""
        slots: Int64 = np.searchsorted(self._place_start, places, side="right") - 1
        return slots

    def _within_window(self, places: Int64, window: int) -> Int64:
        start = self._place_start[window * self._window]
        end = self._place_start[min((window + 1) * self._window, len(self._place_start) - 1)]
        # The window's number is part of the seed, so windows of equal size get different permutations.
        seed = int(random_words(self._seed, self._epoch, window, Stream.WINDOW_ORDER))
        offsets = permute(
            places - start, num_samples=int(end - start), seed=seed, epoch=self._epoch, stream=Stream.WINDOW_ORDER
        )
        return np.asarray(offsets + start)
