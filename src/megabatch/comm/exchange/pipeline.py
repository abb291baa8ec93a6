"""Runs jobs through the stages of a route during backward: with threads on gloo, with CUDA streams on NCCL.

If two ranks start two collectives of one group in different orders, each collective receives the other's bytes.
Therefore every stage has its own group and its own thread. A thread takes jobs in the order of submission, waits for
its stage's collective, and starts the next stage's. Each group thus sees the jobs in the order in which backward
submitted them, which is the same on all ranks. A job waits only for earlier jobs, so there is no deadlock.
"""

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable, Iterator

import torch

from megabatch.comm.exchange.algorithms import Route
from megabatch.comm.exchange.stages import Job

Done = Callable[[BaseException | None], None]
_Queue = queue.SimpleQueue[tuple[Job, Done] | None]


class Failure:
    """First error of an exchange. Later jobs fail with it at once instead of waiting for their own timeout."""

    def __init__(self) -> None:
        self.error: BaseException | None = None


class Pipeline:
    """A route and its threads, one per stage. They start at the first job and stop at `close`."""

    def __init__(self, route: Route, name: str, failure: Failure) -> None:
        self._route = route
        self._name = name
        self._failure = failure
        self._queues: list[_Queue] = []
        self._close: Callable[[], object] = lambda: None

    def submit(self, job: Job, done: Done) -> None:
        """Starts the first stage in the calling thread; a thread calls `done(error or None)` after the last stage."""
        if not self._route:
            done(None)
            return
        if not self._queues:
            self._start_threads()
        # In the caller's thread, so that backward's order is the order on the first group.
        if _started(self._route, job, done, self._failure):
            self._queues[0].put((job, done))

    def close(self) -> None:
        """Stops the threads once they have finished the submitted jobs."""
        self._close()

    def _start_threads(self) -> None:
        self._queues = [queue.SimpleQueue() for _ in self._route]
        threads = []
        for slot in range(len(self._route)):
            # The threads get no reference to this pipeline, so that it can be collected, which stops them.
            arguments = (self._route, self._queues[slot : slot + 2], self._failure)
            threads.append(
                threading.Thread(target=_run_stage, args=arguments, name=f"{self._name} {slot}", daemon=True)
            )
            threads[-1].start()
        self._close = weakref.finalize(self, _stop_threads, self._queues[0], threads)


def _stop_threads(first: _Queue, threads: list[threading.Thread]) -> None:
    """Stops the threads and waits up to 5 s for each; a thread may be blocked in a failed collective.

    A thread that outlives the interpreter would release its process group during shutdown, which aborts the process.
    """
    first.put(None)  # each thread passes it on to the next
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(timeout=5.0)


def _run_stage(route: Route, queues: list[_Queue], failure: Failure) -> None:
    """Body of a stage's thread; `queues` holds the queue of this stage and, unless it is the last, of the next."""
    last = len(queues) == 1
    while (item := queues[0].get()) is not None:
        job, done = item
        if not _completed(route, job, done, failure):
            continue
        if last:
            done(None)
        elif _started(route, job, done, failure):
            queues[1].put((job, done))
        del item, job, done  # otherwise they would keep this job's memory until the next job arrives
    if not last:
        queues[1].put(None)


def _started(route: Route, job: Job, done: Done, failure: Failure) -> bool:
    return _tried(lambda: route[job.slot].start(job), done, failure)


def _completed(route: Route, job: Job, done: Done, failure: Failure) -> bool:
    return _tried(lambda: route[job.slot].complete(job), done, failure)


def _tried(step: Callable[[], None], done: Done, failure: Failure) -> bool:
    """Runs `step` and returns True; after an error, of `step` or of an earlier job, calls `done` and returns False."""
    if failure.error is None:
        try:
            step()
        except BaseException as error:  # noqa: BLE001 - raised where the job's future is waited for
            failure.error = failure.error or error
        else:
            return True
    done(failure.error)
    return False


class Streams:
    """Round-robin CUDA streams for NCCL: a job's stages are enqueued on one stream, and the host does not wait."""

    def __init__(self, device: torch.device, num_streams: int = 4) -> None:
        self._streams = [torch.cuda.Stream(device) for _ in range(num_streams)]  # type: ignore[no-untyped-call]
        self._next = 0

    @contextlib.contextmanager
    def next(self) -> Iterator[torch.cuda.Stream]:
        """Makes the next stream current; its work starts after the work enqueued on the present current stream."""
        stream = self._streams[self._next % len(self._streams)]
        self._next += 1
        # The buffer's gradients are computed on the current stream.
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            yield stream


def run_here(route: Route, job: Job) -> None:
    """Runs all stages one after another, on a GPU on the current stream."""
    for stage in route:
        stage.start(job)
        stage.complete(job)
