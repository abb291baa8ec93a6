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

from megabatch.comm.exchange.algorithms import Route
from megabatch.comm.exchange.stages import Job

Done = Callable[[BaseException | None], None]
_Queue = queue.SimpleQueue[tuple[Job, Done] | None]


class Failure:
    """The first error of an exchange; every job after it fails with it at once, instead of waiting its own timeout."""

    def __init__(self) -> None:
        self.error: BaseException | None = None


class Pipeline:
    """One route and its threads, one per stage; they start with the first job and end with `close`."""

    def __init__(self, route: Route, name: str, failure: Failure) -> None:
        self._route = route
        self._name = name
        self._failure = failure
        self._queues: list[_Queue] = []
        self._close: Callable[[], object] = lambda: None

    def submit(self, job: Job, done: Done) -> None:
        """Start the first stage here and now; `done(error or None)` is called by a thread after the last stage."""
        if not self._route:
            done(None)
            return
        if not self._queues:
            self._start_threads()
        if _started(self._route, job, done, self._failure):
            self._queues[0].put((job, done))

    def close(self) -> None:
        """End the threads after the jobs that they have."""
        self._close()

    def _start_threads(self) -> None:
        self._queues = [queue.SimpleQueue() for _ in self._route]
        threads = []
        for slot in range(len(self._route)):
            arguments = (self._route, self._queues[slot : slot + 2], self._failure)
            threads.append(threading.Thread(target=_serve, args=arguments, name=f"{self._name} {slot}", daemon=True))
            threads[-1].start()
        self._close = weakref.finalize(self, _end, self._queues[0], threads)


def _end(first: _Queue, threads: list[threading.Thread]) -> None:
    """Ask the threads to end and wait for them, save one that hangs in a dead exchange.

    A thread that outlives the interpreter drops its process group when no interpreter is left, which aborts.
    """
    first.put(None)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(timeout=5.0)


def _serve(route: Route, queues: list[_Queue], failure: Failure) -> None:
    """Body of one stage's thread; `queues` are its own and the next stage's."""
    last = len(queues) == 1
    while (item := queues[0].get()) is not None:
        job, done = item
        if not _completed(route, job, done, failure):
            continue
        if last:
            done(None)
        elif _started(route, job, done, failure):
            queues[1].put((job, done))
        del item, job, done  # or the last job's memory would be held until the next one
    if not last:
        queues[1].put(None)


def _started(route: Route, job: Job, done: Done, failure: Failure) -> bool:
    return _tried(lambda: route[job.slot].start(job), done, failure)


def _completed(route: Route, job: Job, done: Done, failure: Failure) -> bool:
    return _tried(lambda: route[job.slot].complete(job), done, failure)


def _tried(step: Callable[[], None], done: Done, failure: Failure) -> bool:
    """Whether `step` went well; if not, or if an earlier job failed, `done` hears of it."""
    if failure.error is None:
        try:
            step()
        except BaseException as error:  # noqa: BLE001 - it belongs to the one who waits for the job
            failure.error = failure.error or error
        else:
            return True
    done(failure.error)
    return False


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
