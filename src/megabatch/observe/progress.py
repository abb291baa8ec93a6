"""Progress display of a run: a live bar on a terminal, plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megabatch.files import printable

PLAIN_LINE_EVERY_S = 10.0


class Progress:
    """Shows a run: epoch, step, images/s, loss, top-1 and time left.

    On a terminal it is a live bar with a line of values, below the lines of past evaluations. Elsewhere (a pipe, a log
    file) it prints at most one line per ten seconds and one per evaluation. `enabled=False` prints nothing, for
    every worker but rank 0; `quiet` prints only `note`.
    """

    def __init__(
        self,
        total_steps: int,
        total_epochs: float,
        enabled: bool = True,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.total_epochs = total_epochs
        self._enabled = enabled
        self._quiet = quiet or not enabled
        self._clock = clock
        self._pace = _Pace(clock)
        self._top1: float | None = None
        self._last_line_s = -math.inf
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        shown = self._console.is_terminal and not self._quiet
        self._live = Live(console=self._console, refresh_per_second=4) if shown else None

    def step(
        self,
        step: int,
        epoch: float,
        loss: float,
        images_per_s: float,
        *,
        total_steps: int | None = None,
        detail: str = "",
    ) -> None:
        """Show that `step` updates are complete, after `epoch` passes over the data; `detail` on a line of its own."""
        self.total_steps = total_steps or self.total_steps
        self._pace.reached(epoch)
        if self._quiet:
            return
        status, left = self._status(step, epoch, loss, images_per_s), self._left()
        if self._live is not None:
            share = min(1.0, epoch / self.total_epochs) if self.total_epochs else 0.0
            self._live.update(_screen(share, left, status, detail))
        elif self._clock() - self._last_line_s >= PLAIN_LINE_EVERY_S:
            self._last_line_s = self._clock()
            self._line(f"{status}  {left}".rstrip())
            if detail:
                self._line(f"  {detail}")

    def end_at(self, total_steps: int, total_epochs: float) -> None:
        """Set where this process ends, if that is before the end of the recipe."""
        self.total_steps, self.total_epochs = total_steps, total_epochs

    def evaluation(self, epoch: float, top1: float, top5: float | None = None, remark: str = "") -> None:
        """Show the accuracies, in [0, 1], of the evaluation at `epoch`, followed by `remark`."""
        self._top1 = top1
        if self._quiet:
            return
        parts = [f"epoch {epoch:.2f}", f"top1 {top1:.4f}"]
        parts += [f"top5 {top5:.4f}"] if top5 is not None else []
        parts += [remark] if remark else []
        self._line("evaluation  " + "  ".join(parts))

    def note(self, text: str) -> None:
        """Print one line, above the bar on a terminal."""
        if self._enabled:
            self._line(text)

    def close(self) -> None:
        """Stop the live display; its last state stays on the screen."""
        if self._live is not None:
            self._live.stop()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, text: str) -> None:
        self._console.print(printable(text), markup=False)

    def _status(self, step: int, epoch: float, loss: float, images_per_s: float) -> str:
        parts = [
            f"epoch {epoch:.2f}/{self.total_epochs:.3g}",
            f"step {step:,}/{self.total_steps:,}",
            f"{images_per_s:,.0f} images/s",
            f"loss {loss:.3f}",
        ]
        parts += [f"top1 {self._top1:.4f}"] if self._top1 is not None else []
        return "  ".join(parts)

    def _left(self) -> str:
        left_s = self._pace.left_s(self.total_epochs)
        return f"{duration(left_s)} left" if left_s is not None else ""


class _Pace:
    """Estimates the time left from epochs, not steps: with a growing batch later steps take longer."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start: tuple[float, float] | None = None
        self._epoch = 0.0

    def reached(self, epoch: float) -> None:
        self._epoch = epoch
        if self._start is None:  # excludes the first step, which compiles, allocates and waits for data
            self._start = (self._clock(), epoch)

    def left_s(self, total_epochs: float) -> float | None:
        if self._start is None:
            return None
        start_s, start_epoch = self._start
        done = self._epoch - start_epoch
        return (self._clock() - start_s) * (total_epochs - self._epoch) / done if done > 0 else None


def duration(seconds: float) -> str:
    """Formats a duration: `48 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _screen(share: float, left: str, status: str, detail: str) -> Group:
    """Returns the bar with the time left and, below it, the status line and `detail`; fits 80 columns."""
    top = Table.grid(expand=True, padding=(0, 2, 0, 0))
    top.add_column(ratio=1)
    top.add_column(no_wrap=True)
    top.add_column(no_wrap=True)
    top.add_row(ProgressBar(total=1.0, completed=share), f"{share:.0%}", left)
    lines = [Text(line, no_wrap=True, overflow="ellipsis") for line in (status, detail) if line]
    return Group(top, *lines)
