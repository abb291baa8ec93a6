"""A stage is one collective of an algorithm on one process group; a job passes through its stages in order.

A job owns a region of a flat buffer. A reduce-scatter narrows the region to this rank's shard, an all-gather widens it
again. Every stage has its own process group. On each group the jobs therefore start in the order of submission on
every rank, independent of the progress of other stages; this makes it safe to have several jobs in flight.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from megabatch.comm.exchange import primitives
from megabatch.comm.exchange.grid import Axis, Grid
from megabatch.comm.exchange.primitives import Work

Scratch = Callable[[int, Tensor], Tensor]  # (stage number, like) -> memory as long as `like`, reused in later steps
GLOO_SEGMENT_BYTES = 2**20  # largest message of gloo's reduce


@dataclass
class Job:
    """A region of a buffer that passes through the stages of one route."""

    region: Tensor
    scratch: Scratch
    number: int = 0  # sequence number among the jobs of an exchange, the same on all ranks
    wholes: list[Tensor] = field(default_factory=list)  # regions before each reduce-scatter, for the all-gathers
    work: Work | None = None
    started_s: float = 0.0
    phases: list[tuple[str, float, float]] = field(default_factory=list)  # (stage, start, end), perf_counter seconds

    @property
    def tag(self) -> int:
        """Tag that separates the messages of jobs in flight in one group."""
        return self.number % 2**20

    @property
    def slot(self) -> int:
        """Index of the job's current stage in its route."""
        return len(self.phases)


@dataclass(frozen=True)
class Stage:
    """A collective along `axis`, on the process group that `lane` selects (see `Grid`)."""

    axis: Axis
    lane: int
    grid: Grid = field(repr=False)

    @property
    def group(self) -> dist.ProcessGroup:
        return self.grid.group(self.axis, self.lane)

    @property
    def name(self) -> str:
        return f"{type(self).__name__} {self.axis}"

    def start(self, job: Job) -> None:
        """Starts the collective and returns at once."""
        job.started_s = time.perf_counter()
        job.work = self._launch(job)

    def complete(self, job: Job) -> None:
        """Waits for the collective and sets the job's region for the next stage."""
        if job.work is not None:
            job.work.wait()
        self._finish(job)
        job.work = None
        job.phases.append((self.name, job.started_s, time.perf_counter()))

    def sent_bytes(self, region_bytes: float) -> float:
        """Returns the bytes that this rank sends for a region of that size."""
        raise NotImplementedError

    def next_bytes(self, region_bytes: float) -> float:
        """Returns the size of the region after this stage."""
        return region_bytes

    def _launch(self, job: Job) -> Work | None:
        raise NotImplementedError

    def _finish(self, job: Job) -> None:
        """Local work after the collective; none by default."""


class ReduceScatter(Stage):
    """Sum along the axis of which each rank keeps its shard; a rank sends (n - 1) / n of the region."""

    def _launch(self, job: Job) -> Work:
        shard = job.region.chunk(self.grid.size(self.axis))[self.grid.index(self.axis)]
        received = job.scratch(job.slot, job.region)
        return primitives.start_reduce_scatter(shard, job.region, received, self.group, job.tag)

    def _finish(self, job: Job) -> None:
        whole = job.region
        job.wholes.append(whole)
        job.region = whole.chunk(self.grid.size(self.axis))[self.grid.index(self.axis)]
        primitives.finish_reduce_scatter(job.region, job.scratch(job.slot, whole), self.group)

    def sent_bytes(self, region_bytes: float) -> float:
        return region_bytes * (1 - 1 / self.grid.size(self.axis))

    def next_bytes(self, region_bytes: float) -> float:
        return region_bytes / self.grid.size(self.axis)


class AllGather(Stage):
    """Collection of the shards along the axis; a rank sends its shard n - 1 times."""

    def _launch(self, job: Job) -> Work:
        return primitives.start_all_gather(job.wholes[-1], job.region, self.group, job.tag)

    def _finish(self, job: Job) -> None:
        job.region = job.wholes.pop()

    def sent_bytes(self, region_bytes: float) -> float:
        return region_bytes * (self.grid.size(self.axis) - 1)

    def next_bytes(self, region_bytes: float) -> float:
        return region_bytes * self.grid.size(self.axis)


class AllReduce(Stage):
    """The backend's own all-reduce along the axis; a rank sends 2 (n - 1) / n of the region."""

    def _launch(self, job: Job) -> Work | None:
        return primitives.start_all_reduce(job.region, self.group)

    def sent_bytes(self, region_bytes: float) -> float:
        return 2 * region_bytes * (1 - 1 / self.grid.size(self.axis))


class Reduce(Stage):
    """Sum along the row into its first rank, the leader.

    Gloo's reduce is a ring reduce-scatter in segments of at most 1 MiB, after which each rank but the leader sends its
    chunk to the leader. In the ring a rank sends every segment except the last two of its own chunk. For M bytes the n
    ranks together send (n^2 - 1) / n * M, and more if M exceeds 2 n MiB, as a chunk then has more than two segments.
    """

    def _launch(self, job: Job) -> Work:
        return primitives.start_reduce(job.region, self.grid.ranks(self.axis)[0], self.group)

    def sent_bytes(self, region_bytes: float) -> float:
        size, index = self.grid.size(self.axis), self.grid.index(self.axis)
        if primitives.is_native(self.group):
            return _chain_bytes(region_bytes, size)
        segment = min(max(math.ceil(region_bytes / (2 * size)), 1), GLOO_SEGMENT_BYTES)
        chunk = segment * math.ceil(max(region_bytes / segment, 2 * size) / size)
        start, end = min(index * chunk, region_bytes), min((index + 1) * chunk, region_bytes)
        kept = max(end - ((index + 1) * chunk - 2 * segment), 0.0)
        return region_bytes - kept + (end - start if index else 0.0)


class LeadersAllReduce(AllReduce):
    """An all-reduce among the leaders of the rows; the other ranks do nothing."""

    def _launch(self, job: Job) -> Work | None:
        return None if _follows_row(self.grid) else super()._launch(job)

    def sent_bytes(self, region_bytes: float) -> float:
        return 0.0 if _follows_row(self.grid) else super().sent_bytes(region_bytes)


class Broadcast(Stage):
    """Copy of the leader's region to every rank of its row; gloo uses a binomial tree."""

    def _launch(self, job: Job) -> Work:
        return primitives.start_broadcast(job.region, self.grid.ranks(self.axis)[0], self.group)

    def sent_bytes(self, region_bytes: float) -> float:
        size, index = self.grid.size(self.axis), self.grid.index(self.axis)
        if primitives.is_native(self.group):
            return _chain_bytes(region_bytes, size)
        # In round k the 2^k ranks that hold the region each send it to the rank 2^k places further on.
        children = sum(index < 1 << k < size - index for k in range(size.bit_length()))
        return region_bytes * children


def _chain_bytes(region_bytes: float, size: int) -> float:
    """Mean over the ranks of what they send in an NCCL reduce or broadcast: all but the last pass the region on."""
    return region_bytes * (1 - 1 / size)


def _follows_row(grid: Grid) -> bool:
    return grid.index("row") > 0
