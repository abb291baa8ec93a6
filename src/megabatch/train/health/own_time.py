"""The time that a worker spends on a step without waiting for the others."""

import time


class OwnTime:
    """Mean time that a worker spends on its own part of a step; `start` and `mark` stamp the host's clock."""

    def __init__(self) -> None:
        self._started = self._marked = self._sum_s = 0.0
        self.num_steps = 0

    def start(self) -> None:
        """Starts a step."""
        self._started = self._marked = time.perf_counter()

    def mark(self) -> None:
        """Called after each forward; the last one counts."""
        self._marked = time.perf_counter()

    def finish(self) -> None:
        """Ends a step."""
        self._sum_s += self._marked - self._started
        self.num_steps += 1

    def mean_s(self) -> float:
        """Mean of the `num_steps` steps since `reset`, in seconds; 0 without steps."""
        return self._sum_s / max(1, self.num_steps)

    def reset(self) -> None:
        """Forgets the steps so far."""
        self._sum_s, self.num_steps = 0.0, 0
