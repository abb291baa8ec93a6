"""Tells a source which shards a loader will read next, so that the source can prefetch them."""

from collections.abc import Sequence

import numpy as np

from megabatch.data.sources.arrays import ArraySource
from megabatch.data.sources.protocol import EncodedSource, ReadsAhead


class ReadAhead:
    """Announces the next shards to a source that implements `ReadsAhead`, once per change; else does nothing."""

    def __init__(self, source: ArraySource | EncodedSource) -> None:
        self._source = source if isinstance(source, ReadsAhead) else None
        sizes = np.asarray(self._source.shard_sizes if self._source else [], dtype=np.int64)
        self._firsts = np.cumsum(sizes) - sizes
        self._announced: list[int] = []

    @property
    def is_supported(self) -> bool:
        """True if the source prefetches shards that are announced."""
        return self._source is not None

    def announce(self, shards: Sequence[int]) -> None:
        """Announces that these shards, none of them empty, are read next, in this order."""
        if self._source is not None and list(shards) != self._announced:
            self._announced = list(shards)
            self._source.will_read(self._firsts[self._announced].tolist())

    def announce_from(self, index: int) -> None:
        """Announces the shard of sample `index` and the next one, for reading in index order."""
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        self.announce(range(shard, min(shard + 2, len(self._firsts))))
