"""Divides the seconds of a training step among its phases: input, forward, backward, exchange, update."""

import itertools
import time
from dataclasses import dataclass

import torch

from megabatch.comm.exchange.timeline import Stamp, seconds_between, stamp


@dataclass(frozen=True)
class PhaseSpan:
    """An interval of one phase, in seconds from the start of the step."""

    phase: str
    start_s: float
    length_s: float


class StepClock:
    """Attributes the time between two marks to a phase. A mark costs about a microsecond.

    On a CPU the marks are times of the host. On a GPU they are CUDA events in the stream of the step, so that "input"
    is the time for which the device waited for data; `spans` then waits for the last mark.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.start = stamp(device)
        self._marks: list[tuple[str, Stamp]] = []
        self._host_start_s = time.perf_counter()
        self.own_s = 0.0  # of the host, from the start to the last mark of input or forward: without waits for workers

    def mark(self, phase: str) -> None:
        """Ends an interval of `phase`, which began at the mark before."""
        self._marks.append((phase, stamp(self._device)))
        if phase in {"input", "forward"}:
            self.own_s = time.perf_counter() - self._host_start_s

    def spans(self) -> list[PhaseSpan]:
        """The intervals in order; waits for the device."""
        if self._marks and not isinstance(last := self._marks[-1][1], float):
            last.synchronize()
        offsets = [0.0, *(seconds_between(self.start, at) for _, at in self._marks)]
        return [
            PhaseSpan(phase, start, end - start)
            for (phase, _), (start, end) in zip(self._marks, itertools.pairwise(offsets), strict=True)
        ]

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, in the order of their first mark; waits for the device."""
        total: dict[str, float] = {}
        for span in self.spans():
            total[span.phase] = total.get(span.phase, 0.0) + span.length_s
        return total
