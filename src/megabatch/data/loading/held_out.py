"""A fraction of the training samples held out for evaluation: the same ones in every run and on every worker."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from megabatch.data.augment.hashing import Stream
from megabatch.data.loading.order import permute
from megabatch.data.sources.arrays import ArraySource
from megabatch.data.sources.protocol import EncodedSource, ReadsMany

Int64 = NDArray[np.int64]


class Subset:
    """Samples `indices` of a source, in that order, as an `EncodedSource` without shards."""

    shard_sizes: Sequence[int] | None = None

    def __init__(self, source: EncodedSource, indices: Int64) -> None:
        self._source, self._indices = source, indices
        self.labels: Int64 = source.labels[indices]
        self.class_names = source.class_names
        if isinstance(source, ReadsMany):
            self.read_many = lambda part: source.read_many(indices[part])

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> bytes:
        """Returns the complete file of one sample."""
        return self._source.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        """Returns a readable name of the sample."""
        return self._source.name(int(self._indices[index]))


def hold_out(
    source: ArraySource | EncodedSource, fraction: float
) -> tuple[ArraySource | EncodedSource, ArraySource | EncodedSource]:
    """Returns the rest of `source` and the held-out samples, both in index order.

    Of n samples of a class, round(fraction n) are held out, at least 1 and at most n - 1; of a single sample none.
    Which ones depends on the labels alone, not on a seed.
    """
    chosen = held_out(np.asarray(source.labels), fraction)
    rest = np.setdiff1d(np.arange(len(source)), chosen)
    return _part(source, rest), _part(source, chosen)


def held_out(labels: Int64, fraction: float) -> Int64:
    """Indices that `hold_out` holds out, ascending."""
    found = [np.empty(0, dtype=np.int64)]
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        order = permute(np.arange(count), num_samples=len(members), seed=0, epoch=label, stream=Stream.HELD_OUT)
        found.append(members[order])
    return np.sort(np.concatenate(found))


def _part(source: ArraySource | EncodedSource, indices: Int64) -> ArraySource | EncodedSource:
    if not isinstance(source, ArraySource):
        return Subset(source, indices)
    at = torch.from_numpy(indices).to(source.device)
    return ArraySource(source.images[at], source.labels[at], source.class_names)
