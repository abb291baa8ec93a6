"""Word to a source about the shards that a loader will read next."""

from collections.abc import Sequence

import numpy as np

from megabatch.data.sources.arrays import ArraySource
from megabatch.data.sources.protocol import EncodedSource, ReadsAhead


class ReadAhead:
    """Tells a source that reads ahead which shards come next, once for each change; others are told nothing."""

    def __init__(self, source: ArraySource | EncodedSource) -> None:
        self._source = source if isinstance(source, ReadsAhead) else None
        sizes = np.asarray(self._source.shard_sizes if self._source else [], dtype=np.int64)
        self._firsts = np.cumsum(sizes) - sizes
        self._said: list[int] = []

    @property
    def listens(self) -> bool:
        return self._source is not None

    def say(self, shards: Sequence[int]) -> None:
        """These shards, none of them empty, are read next, in this order."""
        if self._source is not None and list(shards) != self._said:
            self._said = list(shards)
            self._source.will_read(self._firsts[self._said].tolist())

    def say_from(self, index: int) -> None:
        """Samples are read in index order, from this one on."""
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        self.say(range(shard, min(shard + 2, len(self._firsts))))
