"""Samples that could not be read: logged once each by rank 0, and counted over all workers."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from megabatch.comm.launch import all_gather_objects
from megabatch.train.state import Run


@runtime_checkable
class ReplacesBadSamples(Protocol):
    """A loader that replaces unreadable samples (data/loading/base_loader.py)."""

    @property
    def num_replaced(self) -> int:
        """Number of times a batch held a replacement for an unreadable sample."""
        ...

    @property
    def bad_samples(self) -> Mapping[int, str]:
        """Index and reason of each sample known to be bad."""
        ...

    def learn_bad_samples(self, reasons: Mapping[int, str]) -> None:
        """Adds, and logs, samples that other workers could not read."""
        ...


class BadSamples:
    """Unreadable samples of all workers, synchronized whenever the workers evaluate or save anyway.

    Between two synchronizations rank 0 logs only the samples that it met itself. Each costs one gather of Python
    objects, which hold what is new since the last one.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._known: set[int] = set()  # on all workers
        self._logged: dict[str, int] = {}

    def synchronize(self) -> None:
        """Shares the bad samples of all workers with each of them, and logs their number if it has changed.

        A collective: all workers call it together.

        Raises:
            DataError: more samples are bad than `max_bad_share` allows.
        """
        loader = self._run.loader
        if not isinstance(loader, ReplacesBadSamples):
            return
        fresh = {index: reason for index, reason in loader.bad_samples.items() if index not in self._known}
        gathered = all_gather_objects((loader.num_replaced, fresh), self._run.world)
        found = {index: reason for _, reasons in gathered for index, reason in reasons.items()}
        self._known |= found.keys()
        self._log({"num_bad_samples": len(self._known), "num_replaced_samples": sum(count for count, _ in gathered)})
        loader.learn_bad_samples(found)

    def _log(self, counts: dict[str, int]) -> None:
        if any(counts.values()) and counts != self._logged:
            self._logged = counts
            self._run.log({"event": "bad_samples", "step": self._run.state.step} | counts)
