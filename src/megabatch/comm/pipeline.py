"""Jobs on their way through a route while backward goes on: threads on gloo, streams on NCCL.

Without an order agreed between ranks, two collectives of one group may start the other way round on another rank
and exchange each other's bytes. Here every stage has a group and a thread of its own; a thread takes jobs strictly
in the order of submission, waits for its stage, and starts the next stage. So each group sees the jobs in the order
in which backward made them, which is the same on all ranks, and a job waits only for jobs before it: no deadlock.
"""

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable

import torch

from megabatch.comm.algorithms import Route
from megabatch.comm.stages import Job

Done = Callable[[BaseException | None], None]
_Queue = queue.SimpleQueue[tuple[Job, Done] | None]


class Pipeline:
    """One route and its threads, one per stage; they start with the first job and end with `close`."""

    def __init__(self, route: Route, name: str) -> None:
        self._route = route
        self._name = name
        self._queues: list[_Queue] = []
        self._close: Callable[[], object] = lambda: None

    def submit(self, job: Job, done: Done) -> None:
        """Start the first stage here and now; `done(error or None)` is called by a thread after the last stage."""
        if not self._route:
            done(None)
            return
        if not self._queues:
            self._start_threads()
        if _started(self._route, job, done):
            self._queues[0].put((job, done))

    def close(self) -> None:
        """End the threads after the jobs that they have."""
        self._close()

    def _start_threads(self) -> None:
        self._queues = [queue.SimpleQueue() for _ in self._route]
        for slot in range(len(self._route)):
            arguments = (self._route, slot, self._queues[slot : slot + 2])
            threading.Thread(target=_serve, args=arguments, name=f"{self._name} {slot}", daemon=True).start()
        self._close = weakref.finalize(self, self._queues[0].put, None)


def _serve(route: Route, slot: int, queues: list[_Queue]) -> None:
    """Body of the thread of stage `slot`; `queues` are its own and the next stage's."""
    last = len(queues) == 1
    while (item := queues[0].get()) is not None:
        job, done = item
        try:
            route[slot].complete(job)
        except BaseException as error:  # noqa: BLE001 - it belongs to the one who waits for the job
            done(error)
            continue
        if last:
            done(None)
        elif _started(route, job, done):
            queues[1].put((job, done))
        del item, job, done
    if not last:
        queues[1].put(None)


def _started(route: Route, job: Job, done: Done) -> bool:
    try:
        route[job.slot].start(job)
    except Exception as error:  # noqa: BLE001 - it belongs to the one who waits for the job
        done(error)
        return False
    return True


class Streams:
    """The same for NCCL: a job's stages are put on a CUDA stream of its own, and nothing waits on the host."""

    def __init__(self, device: torch.device, num_streams: int = 4) -> None:
        self._streams = [torch.cuda.Stream(device) for _ in range(num_streams)]  # type: ignore[no-untyped-call]
        self._next = 0

    @contextlib.contextmanager
    def next(self):  # type: ignore[no-untyped-def]
        """The next stream as the current one, after the work that is on the current one now."""
        stream = self._streams[self._next % len(self._streams)]
        self._next += 1
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            yield stream


def run_here(route: Route, job: Job) -> None:
    """All stages one after another on the current stream."""
    for stage in route:
        stage.start(job)
        stage.complete(job)
