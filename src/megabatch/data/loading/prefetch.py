"""Work done ahead in background threads, handed over in order."""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Request = TypeVar("Request")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def serial_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Threads in which torch does its work on the CPU alone.

    Elsewhere it shares out every operation on more than 32,768 elements to threads of its own and waits for the
    slowest; beside threads that decode, which hold the cores, a loader took three times as long and more. How many
    threads torch uses is kept for each thread that calls it, and once more for all that have not called it yet.
    """
    before = torch.get_num_threads()
    executor = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=_use_one_torch_thread)
    started = threading.Barrier(count)
    wait([executor.submit(started.wait) for _ in range(count)])
    torch.set_num_threads(before)
    return executor


def _use_one_torch_thread() -> None:
    torch.get_num_threads()  # takes on the number kept for all, which would else come back with the first operation
    torch.set_num_threads(1)


def in_order(
    work: Callable[[Request], Result], requests: Iterable[Request], *, executor: Executor, depth: int
) -> Generator[Result, None, None]:
    """`work(request)` for each request, in their order, with up to `depth` of them running or waiting for collection.

    Requests are taken from the iterable in the caller's thread, at most `depth` ahead of the result handed out. An
    exception of `work` is raised where its result would have come. Closing the iterator cancels what has not started
    and waits for what has.
    """
    waiting: deque[Future[Result]] = deque()
    try:
        for request in requests:
            waiting.append(executor.submit(work, request))
            if len(waiting) >= depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        _abandon(waiting)


def _abandon(waiting: deque[Future[Result]]) -> None:
    for future in waiting:
        future.cancel()
    for future in waiting:
        if not future.cancelled():
            future.exception()
