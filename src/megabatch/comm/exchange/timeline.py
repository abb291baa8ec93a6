"""Times at which each bucket was ready, sent and done, and the exposed communication of each step.

    exposed = last bucket done - last bucket ready

A bucket is ready when the last of its gradients exists. Once the last bucket is ready, backward has nothing left to
compute, so the rest of the exchange is not hidden by computation.
"""

import threading
import time
from dataclasses import dataclass, field
from typing import TypedDict

import torch

Stamp = float | torch.cuda.Event


@dataclass
class BucketTimes:
    """One bucket in one step. Stamps are `perf_counter` seconds, or CUDA events until `finish_step`."""

    index: int
    numel: int
    sent_bytes: float
    ready: Stamp
    sent: Stamp = 0.0
    done: Stamp = 0.0
    phases: list[tuple[str, float, float]] = field(default_factory=list)


class BucketReport(TypedDict):
    """Times of one bucket in milliseconds, from the moment at which the step's first bucket was ready."""

    index: int
    numel: int
    ready_ms: float
    sent_ms: float
    done_ms: float


class StepReport(TypedDict):
    """The exchange of one step; `bytes_on_wire` are sent by this rank, by the stages' formulas.

    `first_ready_s` is the moment from which the buckets' times count, on `time.perf_counter`. `stages` are the parts of
    the exchange on a CPU: bucket, name, start and end on that clock.
    """

    first_ready_s: float
    exposed_ms: float
    num_buckets: int
    bytes_on_wire: int
    buckets: list[BucketReport]
    stages: list[tuple[int, str, float, float]]


class Timeline:
    """Records the buckets of each step: pass one to `ExchangeState` or `wrap`, and call `finish_step` every step.

    On a GPU the stamps are CUDA events and `finish_step` synchronizes with the last of them; train without a timeline
    to avoid that.
    """

    def __init__(self) -> None:
        self._open: list[BucketTimes] = []
        self._lock = threading.Lock()

    def ready(self, index: int, numel: int, sent_bytes: float, device: torch.device) -> BucketTimes:
        """Starts the record of a bucket whose gradients exist now, and returns it."""
        times = BucketTimes(index, numel, sent_bytes, stamp(device))
        with self._lock:
            self._open.append(times)
        return times

    def finish_step(self) -> StepReport:
        """Ends the step after backward and returns its report; without a bucket all values are zero or empty."""
        with self._lock:
            step, self._open = self._open, []
        if not step:
            return StepReport(first_ready_s=0.0, exposed_ms=0.0, num_buckets=0, bytes_on_wire=0, buckets=[], stages=[])
        _settle(step)
        start = min(_s(b.ready) for b in step)
        exposed = max(_s(b.done) for b in step) - max(_s(b.ready) for b in step)
        return {
            "first_ready_s": start,
            "exposed_ms": 1e3 * max(exposed, 0.0),
            "num_buckets": len(step),
            "bytes_on_wire": round(sum(b.sent_bytes for b in step)),
            "buckets": [_describe(bucket, start) for bucket in step],
            "stages": [(bucket.index, name, first, last) for bucket in step for name, first, last in bucket.phases],
        }


def stamp(device: torch.device) -> Stamp:
    """Returns the present time on `device`: the host's clock, or an event on the current CUDA stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def seconds_between(start: Stamp, end: Stamp) -> float:
    """Seconds from `start` to `end`, two stamps of one device; both events have completed."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start
    return 1e-3 * float(start.elapsed_time(end))


def _settle(step: list[BucketTimes]) -> None:
    """Replaces events by seconds on the host's clock; the last event is taken to complete now."""
    if isinstance(step[0].ready, float):
        return
    events = [event for bucket in step for event in (bucket.ready, bucket.sent, bucket.done)]
    cuda_events = [event for event in events if not isinstance(event, float)]
    for event in cuda_events:
        event.synchronize()
    # Events give only differences; the last one, which `synchronize` has just awaited, links them to the host's clock.
    base, now = cuda_events[0], time.perf_counter()
    seconds = {id(event): 1e-3 * base.elapsed_time(event) for event in cuda_events}
    last = max(seconds.values())
    for bucket in step:
        bucket.ready, bucket.sent, bucket.done = (
            event if isinstance(event, float) else now - last + seconds[id(event)]
            for event in (bucket.ready, bucket.sent, bucket.done)
        )


def _s(value: Stamp) -> float:
    assert isinstance(value, float)  # `_settle` has replaced the events
    return value


def _describe(bucket: BucketTimes, start_s: float) -> BucketReport:
    return {
        "index": bucket.index,
        "numel": bucket.numel,
        "ready_ms": 1e3 * (_s(bucket.ready) - start_s),
        "sent_ms": 1e3 * (_s(bucket.sent) - start_s),
        "done_ms": 1e3 * (_s(bucket.done) - start_s),
    }
