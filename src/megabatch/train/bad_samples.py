"""Samples that could not be read: named once each by the first worker, whoever met them, and counted over all."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from megabatch.comm.launch import all_gather_objects
from megabatch.train.state import Run


@runtime_checkable
class MeetsDamage(Protocol):
    """A loader over files, of which some may be damaged (data/loading/base_loader.py)."""

    @property
    def num_replaced(self) -> int:
        """How often a batch held another sample in place of one that could not be read."""
        ...

    @property
    def bad_samples(self) -> Mapping[int, str]:
        """Index and reason of each sample known to be bad."""
        ...

    def learn_bad_samples(self, reasons: Mapping[int, str]) -> None:
        """Takes in, and names, what other workers could not read."""
        ...


class Damage:
    """What the workers' loaders could not read, exchanged when all of them stop to evaluate or to save anyway.

    Between two meetings only the first worker's own finds are in its log. One gather of Python objects a meeting,
    which hold what is new since the last one.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._met: set[int] = set()  # what all workers know
        self._logged: dict[str, int] = {}

    def meet(self) -> None:
        """Makes every worker know all bad samples, and logs their number where it has changed.

        Called by all workers together.

        Raises:
            DataError: they exceed the share of the data set that may be bad.
        """
        loader = self._run.loader
        if not isinstance(loader, MeetsDamage):
            return
        fresh = {index: reason for index, reason in loader.bad_samples.items() if index not in self._met}
        told = all_gather_objects((loader.num_replaced, fresh), self._run.world)
        found = {index: reason for _, reasons in told for index, reason in reasons.items()}
        self._met |= found.keys()
        self._log({"num_bad_samples": len(self._met), "num_replaced_samples": sum(count for count, _ in told)})
        loader.learn_bad_samples(found)

    def _log(self, counts: dict[str, int]) -> None:
        if any(counts.values()) and counts != self._logged:
            self._logged = counts
            self._run.log({"event": "bad_samples", "step": self._run.state.step} | counts)
