"""Compares the workers every few steps: their weights, their position in the data, and their own time per step.

One all-reduce of world_size x 4 int64, in which each worker fills its row:

    sum over sampled weights i of bits(w_i) * m_i  mod 2^64 | samples seen | steps | own time in microseconds

Weights and positions must be equal on all workers, bit for bit. A worker's own time is that from the start of a step to
the end of its last forward: waiting for data, all forwards, and all backwards but the last, in which workers wait for
each other's gradients. Where a batch-norm span is shared by workers, forwards wait for each other, too. On a GPU it is
the host's time: data and launches.
"""

import statistics
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megabatch.comm.launch import sum_over_workers
from megabatch.errors import DesyncError
from megabatch.train.cuda_graph import Readback
from megabatch.train.state import Run

SAMPLES_PER_TENSOR = 64
SLOW_FACTOR, SLOW_S = 1.5, 0.005
"""A worker is slow if its own time exceeds the median of the others by this factor and by this many seconds."""
LEAST_STEPS = 10
"""Fewer steps do not show that a worker is slow: the first ones allocate and wait for the first images."""
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that a change of one bit always changes the sum


class RankComparison:
    """Compares the workers of a run every `run.compare_every_steps` steps and before each checkpoint.

    On a GPU the result is read one step later, or before the checkpoint, so that the device never waits for Python.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pending: tuple[int, Readback] | None = None
        self._slow: int | None = None
        self._own_s: list[float] = []  # of the steps since the last comparison of enough of them
        self._is_long = False  # the last own times are means of enough steps

    def after_step(self, own_s: float, *, before_checkpoint: bool) -> None:
        """Compares if it is time to; `own_s` is this worker's own time. A collective, after the same steps on all.

        Raises:
            DesyncError: weights or positions differ; the same error on every worker.
        """
        run = self._run
        if run.world.world_size == 1 or not run.compare_every_steps:
            return
        self._own_s.append(own_s)
        self._read()
        if before_checkpoint or run.state.step % run.compare_every_steps == 0:
            self._pending = (run.state.step, Readback(sum_over_workers(self._rows(), run.world)))
            if before_checkpoint or not self._pending[1].is_asynchronous:
                self._read()

    def _rows(self) -> Tensor:
        """(world_size, 4) int64: this worker's row, and zeros."""
        run, state = self._run, self._run.state
        rows = torch.zeros(run.world.world_size, 4, dtype=torch.int64, device=run.world.device)
        rows[run.world.rank, 0] = weights_hash(state.module, state.step // run.compare_every_steps)
        own = [state.samples_seen, state.step, round(1e6 * statistics.fmean(self._own_s))]
        self._is_long = len(self._own_s) >= LEAST_STEPS
        if self._is_long:
            self._own_s.clear()
        rows[run.world.rank, 1:] = torch.tensor(own, device=rows.device)
        return rows

    def _read(self) -> None:
        if self._pending is None:
            return
        (step, readback), self._pending = self._pending, None
        hashes, seen, steps, own_us = zip(*readback.read_exactly(), strict=True)
        refuse_different("weights", hashes, step)
        refuse_different("position in the data", list(zip(seen, steps, strict=True)), step)
        self._report([us / 1e6 for us in own_us], step)

    def _report(self, own_s: Sequence[float], step: int) -> None:
        """Logs the slowest worker, and warns when it becomes slow."""
        slowest = max(range(len(own_s)), key=own_s.__getitem__)
        median_s = statistics.median(own_s[:slowest] + own_s[slowest + 1 :])  # type: ignore[operator]
        is_slow = self._is_long and own_s[slowest] > max(SLOW_FACTOR * median_s, median_s + SLOW_S)
        slowest_ms, median_ms = 1e3 * own_s[slowest], 1e3 * median_s
        facts = {"slowest_rank": slowest, "slowest_own_ms": slowest_ms, "median_own_ms": median_ms, "is_slow": is_slow}
        self._run.log({"event": "workers", "step": step} | facts)
        if is_slow and slowest != self._slow:
            text = (
                f"worker {slowest} is slow: {slowest_ms:.1f} ms of its own work per step before step {step}, the "
                f"others {median_ms:.1f} ms (median), and wait. Its cores, disk or GPU may be shared or throttled"
            )
            self._run.log({"event": "warning", "text": text})
        if self._is_long:
            self._slow = slowest if is_slow else None


def weights_hash(module: nn.Module, offset: int) -> Tensor:
    """Hash of up to `SAMPLES_PER_TENSOR` elements of each parameter, 0-d int64; other elements for each `offset`."""
    samples = [_sample(parameter.detach(), offset) for parameter in module.parameters()]
    bits = torch.cat(samples).view(torch.int32).long()
    return (bits * (torch.arange(1, 2 * len(bits), 2, device=bits.device) * _MULTIPLIER)).sum()


def _sample(weights: Tensor, offset: int) -> Tensor:
    """Elements of a dense tensor at equal distances in memory, whatever its memory format; no copy of the rest."""
    stride = -(-weights.numel() // SAMPLES_PER_TENSOR) or 1
    first = offset % stride
    count = len(range(first, weights.numel(), stride))
    return weights.as_strided((count,), (stride,), weights.storage_offset() + first).float()


def refuse_different(what: str, values: Sequence[object], step: int) -> None:
    """Raises DesyncError, which names the ranks that are not in the majority, if the ranks' values differ."""
    counts = Counter(values)
    if len(counts) == 1:
        return
    value, count = counts.most_common(1)[0]
    others = [rank for rank, own in enumerate(values) if own != value]
    if 2 * count > len(values):
        who = f"{_ranks(others)} no longer the {what} of the other {count}"
    else:
        who = f"no majority of the {len(values)} workers has the same {what}: {_ranks(others)} not that of worker "
        who += str(values.index(value))
    raise DesyncError(
        f"{who} after step {step}, so the run was stopped before another checkpoint; memory, cores or GPU there may be "
        "faulty, or its software differs. Without that machine, --resume continues from the newest checkpoint"
    )


def _ranks(ranks: Sequence[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"worker {listed} has" if len(ranks) == 1 else f"workers {listed} have"
