"""Interface between loaders and data sets whose images are files: bytes and label of each sample by index."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class EncodedSource(Protocol):
    """A data set of encoded image files. `read` must be thread-safe."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class index of each sample, [n]."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, in the order of the labels."""

    @property
    def shard_sizes(self) -> Sequence[int] | None:
        """Number of samples in each shard, in index order; None if the samples are not in shards."""

    def __len__(self) -> int:
        """Number of samples."""

    def read(self, index: int) -> bytes:
        """Returns the complete file of one sample. A DataError or OSError makes it a bad sample."""

    def name(self, index: int) -> str:
        """Returns a readable name of the sample: a path, or a member of a shard."""


Files = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""The bytes of n files behind each other, and where each begins and the last ends, [n + 1]."""


@runtime_checkable
class ReadsMany(Protocol):
    """A source that reads several samples at once."""

    def read_many(self, indices: NDArray[np.int64]) -> Files:
        """Returns the files of these samples; thread-safe. A DataError or OSError if one of them cannot be read."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A source in shards that can prefetch shards which are announced."""

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Number of samples in each shard, in index order."""

    def will_read(self, indices: Iterable[int]) -> None:
        """Announces samples whose shards are read next, in this order; must not block."""
