"""One stage = one collective of an algorithm on one group; a job goes through its stages in order.

A job owns a region of a flat buffer. A reduce-scatter narrows the region to this rank's shard of it, an all-gather
widens it again. Every stage has a group of its own, so that on each group the jobs start in the order in which they
were submitted, on every rank, whatever the stages around it are doing: that is what makes several jobs in flight safe.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from megabatch.comm.exchange import primitives
from megabatch.comm.exchange.grid import Axis, Grid
from megabatch.comm.exchange.primitives import Work

Scratch = Callable[[int, Tensor], Tensor]  # (stage number, like) -> memory as long as `like`, kept between steps


@dataclass
class Job:
    """A region of a buffer on its way through the stages of one route."""

    region: Tensor
    scratch: Scratch
    number: int = 0  # counts the jobs of an exchange, equal on all ranks
    wholes: list[Tensor] = field(default_factory=list)
    work: Work | None = None
    started_s: float = 0.0
    phases: list[tuple[str, float, float]] = field(default_factory=list)  # (stage, start, end), perf_counter seconds

    @property
    def tag(self) -> int:
        """Tells apart the messages of jobs under way in one group."""
        return self.number % 2**20

    @property
    def slot(self) -> int:
        """The number of the stage that the job is in."""
        return len(self.phases)


@dataclass(frozen=True)
class Stage:
    """A collective along `axis`; `lane` gives it a group of its own."""

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
        """Launch the collective without waiting."""
        job.started_s = time.perf_counter()
        job.work = self._launch(job)

    def complete(self, job: Job) -> None:
        """Wait for the collective and leave the job's region ready for the next stage."""
        if job.work is not None:
            job.work.wait()
        self._finish(job)
        job.work = None
        job.phases.append((self.name, job.started_s, time.perf_counter()))

    def sent_bytes(self, region_bytes: float) -> float:
        """Bytes that this rank sends for a region of that size."""
        raise NotImplementedError

    def next_bytes(self, region_bytes: float) -> float:
        """Size of the region after this stage."""
        return region_bytes

    def _launch(self, job: Job) -> Work | None:
        raise NotImplementedError

    def _finish(self, job: Job) -> None:
        """Nothing is left to do unless a stage says so."""


class ReduceScatter(Stage):
    """Sum along the axis, each rank keeping its shard: (n - 1) / n of the region is sent."""

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
    """Collect the shards along the axis: (n - 1) shards are sent."""

    def _launch(self, job: Job) -> Work:
        return primitives.start_all_gather(job.wholes[-1], job.region, self.group, job.tag)

    def _finish(self, job: Job) -> None:
        job.region = job.wholes.pop()

    def sent_bytes(self, region_bytes: float) -> float:
        return region_bytes * (self.grid.size(self.axis) - 1)

    def next_bytes(self, region_bytes: float) -> float:
        return region_bytes * self.grid.size(self.axis)


class AllReduce(Stage):
    """The backend's own all-reduce along the axis: 2 (n - 1) / n of the region is sent."""

    def _launch(self, job: Job) -> Work | None:
        return primitives.start_all_reduce(job.region, self.group)

    def sent_bytes(self, region_bytes: float) -> float:
        return 2 * region_bytes * (1 - 1 / self.grid.size(self.axis))


class Reduce(Stage):
    """Sum along the row into its first rank, the leader; others send the region once on average."""

    def _launch(self, job: Job) -> Work:
        return primitives.start_reduce(job.region, self.grid.ranks(self.axis)[0], self.group)

    def sent_bytes(self, region_bytes: float) -> float:
        return region_bytes * (1 - 1 / self.grid.size(self.axis)) if _follows(self) else 0.0


class LeadersAllReduce(AllReduce):
    """An all-reduce among the leaders of the rows; other ranks have nothing to do."""

    def _launch(self, job: Job) -> Work | None:
        return None if _follows_row(self.grid) else super()._launch(job)

    def sent_bytes(self, region_bytes: float) -> float:
        return 0.0 if _follows_row(self.grid) else super().sent_bytes(region_bytes)


class Broadcast(Stage):
    """The leader's region to every rank of its row."""

    def _launch(self, job: Job) -> Work:
        return primitives.start_broadcast(job.region, self.grid.ranks(self.axis)[0], self.group)

    def sent_bytes(self, region_bytes: float) -> float:
        return 0.0 if _follows(self) else region_bytes * (self.grid.size(self.axis) - 1)


def _follows(stage: Stage) -> bool:
    return stage.grid.index(stage.axis) > 0


def _follows_row(grid: Grid) -> bool:
    return grid.index("row") > 0
