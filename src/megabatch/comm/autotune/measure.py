"""Measurement of the gradient exchange on this job's ranks: algorithm x shape x bucket x wire.

Repeats of all cells are interleaved, so that a slow phase of the machine affects all of them. The time of a repeat is
that of its slowest rank, from a barrier to the arrival of the last bucket. All buckets are submitted at once: this is
the time of an exchange that no computation hides.
"""

import itertools
import statistics
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megabatch.comm.autotune.choose import Cell, Measured
from megabatch.comm.exchange.algorithms import ALGORITHMS
from megabatch.comm.exchange.grid import Grid, make_grid
from megabatch.comm.exchange.state import ExchangeState


def cells_to_measure(
    shape: tuple[int, int],
    *,
    algorithms: Sequence[str] = ALGORITHMS,
    buckets_mib: Sequence[float] = (25.0,),
    wires: Sequence[str] = ("fp32",),
) -> list[Cell]:
    """Returns every combination on the grid of `shape`, and the torus on a single column of all ranks as well.

    On gloo the single column has the fewest hops: one for the reduce-scatter and one for the all-gather.
    """
    column = (1, shape[0] * shape[1])
    cells = []
    for bucket_mib, wire, algorithm in itertools.product(buckets_mib, wires, algorithms):
        cells.append(Cell(algorithm, shape, bucket_mib, wire))
        if algorithm == "torus" and shape != column:
            cells.append(Cell(algorithm, column, bucket_mib, wire))
    return cells


class Bench:
    """Measures cells on the ranks of this job. All ranks must construct it and call it in the same order."""

    def __init__(self, hosts: Sequence[str] | None, device: torch.device) -> None:
        self._hosts = hosts
        self._device = device
        self._grids: dict[tuple[int, int], Grid] = {}
        self._states: dict[tuple[tuple[int, int], str], ExchangeState] = {}

    def measure(self, cells: Sequence[Cell], num_bytes: int, *, repeats: int, warmup: int = 1) -> list[Measured]:
        """Returns the times of an exchange of `num_bytes` of fp32 values in each cell, the same on all ranks."""
        gradient = torch.zeros(max(num_bytes // 4, 1), device=self._device)
        times: dict[Cell, list[float]] = {cell: [] for cell in cells}
        for repeat in range(warmup + repeats):
            for cell in cells:
                seconds = self.once(cell, gradient)
                if repeat >= warmup:
                    times[cell].append(seconds)
        return [_summary(cell, num_bytes, times[cell]) for cell in cells]

    def once(self, cell: Cell, gradient: Tensor) -> float:
        """Runs one exchange of the flat fp32 `gradient`; returns the seconds of the slowest rank."""
        state = self._state(cell)
        buckets = torch.split(gradient, max(int(cell.bucket_mib * 2**20) // 4, 1))
        dist.barrier()  # a common start; the time of the slowest rank is collected below
        start = time.perf_counter()
        # All buckets are submitted before the first wait, as backward would.
        futures = [state.exchange(bucket, cell.algorithm, index=index) for index, bucket in enumerate(buckets)]
        for future in futures:
            future.wait()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = torch.tensor([time.perf_counter() - start], device=self._device, dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return float(seconds.item())

    def close(self) -> None:
        """Stops the threads of all exchanges."""
        for state in self._states.values():
            state.close()

    def _state(self, cell: Cell) -> ExchangeState:
        if cell.shape not in self._grids:
            self._grids[cell.shape] = make_grid(shape=cell.shape, hosts=self._hosts)
        key = (cell.shape, cell.wire)
        if key not in self._states:
            self._states[key] = ExchangeState(self._grids[cell.shape], wire=cell.wire)
        return self._states[key]


def _summary(cell: Cell, num_bytes: int, seconds: Sequence[float]) -> Measured:
    # `quantiles` needs two values; a single repeat is its own quartiles.
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return Measured(cell, num_bytes, median, q1, q3, len(seconds))
