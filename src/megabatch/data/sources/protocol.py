"""What the loaders need of a data set whose images are files: bytes by index, and the label of each."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@runtime_checkable
class EncodedSource(Protocol):
    """Images as the bytes of their files. `read` is called from many threads at once."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class index of each sample."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each class, in the order of the labels."""

    @property
    def shard_sizes(self) -> Sequence[int] | None:
        """Samples in each shard, in index order; None where samples are not kept in shards."""

    def __len__(self) -> int:
        """Number of samples."""

    def read(self, index: int) -> bytes:
        """The file of one sample, whole."""

    def name(self, index: int) -> str:
        """What a person calls the sample: a path, or a key in a shard."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A source in shards that are slow to come, and that can be told of them before they are read."""

    @property
    def shard_sizes(self) -> Sequence[int]:
        """Samples in each shard, in index order."""

    def will_read(self, indices: Iterable[int]) -> None:
        """Samples whose shards are read next, in this order; returns at once."""
