"""Each sample is read exactly once per epoch: on any number of workers, in any order, and after a resume."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from photographs import TEST_PHOTOS

from megabatch.data.loading.eval_loader import EvalLoader
from megabatch.data.loading.order import micro_batches, shards_ahead, stream_samples
from megabatch.data.loading.train_loader import TrainLoader
from megabatch.data.packing.pack import pack
from megabatch.data.sources.tar.shards import ShardSource

COLOR = {"pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.2, 0.25, 0.3)}
SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(lambda sizes: sum(sizes) > 0)


def steps_of(first: int, total: int, batch: int) -> list[tuple[int, int]]:
    """First position and count of each step from `first` on; the last step may be short."""
    return [(start, min(batch, total - start)) for start in range(first, total, batch)]


@settings(max_examples=150, deadline=None)
@given(
    sizes=SHARDS,
    shard_local=st.booleans(),
    seed=st.integers(0, 2**32),
    workers=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    span=st.integers(1, 4),
    spans=st.integers(1, 6),
    micro=st.integers(1, 3),
    stop_share=st.floats(0, 1),
)
def test_resuming_at_any_step_on_another_number_of_workers_loses_and_repeats_no_sample(
    sizes, shard_local, seed, workers, span, spans, micro, stop_share
):
    num_samples, epochs = sum(sizes), 3
    steps = steps_of(0, epochs * num_samples, span * spans)
    stop = int(stop_share * len(steps))  # this many steps before the checkpoint
    seen: Counter[tuple[int, int]] = Counter()
    for world_size, part in zip(workers, (steps[:stop], steps[stop:]), strict=True):
        for first, count in part:
            for rank in range(world_size):
                cut = micro_batches(
                    first, count, rank=rank, world_size=world_size, micro_batch_size=micro * span, bn_span=span
                )
                for positions in cut:
                    samples = stream_samples(
                        positions.start,
                        len(positions),
                        num_samples=num_samples,
                        seed=seed,
                        shard_sizes=sizes if shard_local else None,
                    )
                    seen.update(zip(*(values.tolist() for values in samples), strict=True))
    assert seen == Counter({(epoch, sample): 1 for epoch in range(epochs) for sample in range(num_samples)})


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(sizes=SHARDS, seed=st.integers(0, 2**32), at=st.floats(0, 1))
def test_the_announced_shards_are_those_of_this_window_and_the_next(sizes, seed, at):
    """All reads around the position are from announced shards, for as many samples as the two windows hold."""
    num_samples = sum(sizes)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    first = int(at * 2 * num_samples)
    announced = shards_ahead(first, shard_sizes=sizes, seed=seed)
    _, samples = stream_samples(0, 5 * num_samples, num_samples=num_samples, seed=seed, shard_sizes=sizes)
    read = shard_of[samples]
    others = np.flatnonzero(~np.isin(read, announced))
    start = max(others[others < first], default=-1) + 1
    end = min(others[others >= first], default=len(read))
    assert end - start >= sum(sizes[shard] for shard in announced)
    assert set(announced) <= set(read[start:end].tolist())
    assert read[first] in announced[:4]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 24 training photographs in shards of a few each."""
    folder = tmp_path_factory.mktemp("packed")
    pack(TEST_PHOTOS, folder, shard_bytes=60_000)
    return folder


class Counting(ShardSource):
    """Shards that record which samples are read."""

    reads: list[int]

    def read(self, index: int) -> bytes:
        self.reads.append(index)
        return super().read(index)

    def read_many(self, indices):
        self.reads += indices.tolist()
        return super().read_many(indices)


@pytest.mark.parametrize("shard_local", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (5, 2), (4, 5)])
def test_loaders_read_each_photograph_of_the_shards_once_per_epoch(packed, before, after, shard_local):
    source = Counting(sorted(packed.glob("train-*.tar")))
    assert len(source.shard_sizes) > 8
    source.reads, labels, steps = [], [], steps_of(0, 2 * len(source), 10)
    for world_size, part in ((before, steps[:2]), (after, steps[2:])):
        for rank in range(world_size):
            loader = TrainLoader(source, seed=1, shard_local=shard_local, decode_threads=1, **COLOR)
            cut = [
                positions
                for first, count in part
                for positions in micro_batches(
                    first, count, rank=rank, world_size=world_size, micro_batch_size=2, bn_span=2
                )
            ]
            labels += [label for batch in loader.batches((p, 8) for p in cut) for label in batch.labels.tolist()]
            loader.close()
    assert Counter(source.reads) == Counter(dict.fromkeys(range(len(source)), 2))
    assert Counter(labels) == Counter([*source.labels.tolist(), *source.labels.tolist()])


class Announcing(Counting):
    """Shards that record the announced shards."""

    announced: list[list[int]]

    def will_read(self, indices) -> None:
        self.announced.append([self.shard_of(index) for index in indices])


def test_the_training_loader_announces_a_window_and_the_next_before_it_reads_them(packed):
    source = Announcing(sorted(packed.glob("train-*.tar")))
    source.reads, source.announced = [], []
    loader = TrainLoader(source, seed=1, shard_local=True, decode_threads=1, prefetch_batches=1, **COLOR)
    known: set[int] = set()
    for first in range(0, 3 * len(source), 2):
        loader.load(range(first, first + 2), resolution=8)
        known |= set(source.announced[-1])
        assert {source.shard_of(index) for index in source.reads} <= known
    assert all(one != other for one, other in zip(source.announced, source.announced[1:], strict=False))
    windows_an_epoch = -(-len(source.shard_sizes) // 4)
    assert len(source.announced) <= 3 * windows_an_epoch + 1
    in_any_order = TrainLoader(source, seed=1, **COLOR)
    source.announced = []
    in_any_order.load(range(4), resolution=8)
    assert source.announced == []


def test_the_evaluation_loader_announces_the_shard_it_reads_and_the_next(packed):
    source = Announcing(sorted(packed.glob("train-*.tar")))
    source.reads, source.announced = [], []
    loader = EvalLoader(source, resolution=8, decode_threads=1, prefetch_batches=1, **COLOR)
    assert sum(batch.count for batch in loader.batches(0, len(source), 1)) == len(source)
    loader.close()
    last = len(source.shard_sizes) - 1
    assert source.announced == [[shard, shard + 1] for shard in range(last)] + [[last]]
