"""A training stream in which every class has as many places as any other: computed, not drawn, as `order.py` is."""

import numpy as np
from numpy.typing import NDArray

from megabatch.data.augment.hashing import Stream, random_words
from megabatch.data.loading.order import permute

Int64 = NDArray[np.int64]


class BalancedOrder:
    """Samples of a stream whose epoch of n positions has n / K places, give or take one, for each of K classes.

    Place q of epoch e's permutation is slot g = e n + q of the stream. Slot g belongs to class g mod K, and is its
    occurrence j = g div K: place j mod m of pass j div m over the m samples of the class. So each sample of a class
    comes once in each pass, and the passes of a small class follow each other faster.

    Args:
        labels: class of each sample, [n]; classes without samples have no places.
    """

    def __init__(self, labels: Int64, *, seed: int) -> None:
        self._num_samples, self._seed = len(labels), seed
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        classes = np.arange(len(self._members))
        self._class_seeds = [int(word) for word in random_words(seed, 0, classes, Stream.CLASS_ORDER)]

    def samples(self, first: int, count: int) -> tuple[Int64, Int64]:
        """Passes and sample indices, [count] int64 each, of the stream positions `first` .. `first + count - 1`.

        A pass number and an index occur together once, so they key random numbers as an epoch and an index do.
        """
        epochs, places = np.divmod(np.arange(first, first + count, dtype=np.int64), self._num_samples)
        order = permute(places, num_samples=self._num_samples, seed=self._seed, epoch=epochs, stream=Stream.SLOT_ORDER)
        occurrences, classes = np.divmod(epochs * self._num_samples + order, len(self._members))
        passes, indices = np.empty_like(places), np.empty_like(places)
        for number in np.unique(classes).tolist():
            here, members = classes == number, self._members[number]
            passes[here], at = np.divmod(occurrences[here], len(members))
            seed = self._class_seeds[number]
            indices[here] = members[permute(at, num_samples=len(members), seed=seed, epoch=passes[here])]
        return passes, indices
