"""Prefetching by background threads, with results in order."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

Request = TypeVar("Request")
Result = TypeVar("Result")


def serial_threads(count: int, name: str) -> ThreadPoolExecutor:
    """Executor of `count` threads in which torch runs each CPU operation on the calling thread only.

    By default torch splits every operation on more than 32,768 elements among its own threads and waits for the
    slowest. While decoding threads occupy the cores, this made a loader take more than three times as long. torch
    keeps its number of threads per calling thread, and a default for threads that have not called it yet.
    """
    # The barrier makes every thread run its initializer now; setting the number again restores torch's default.
    before = torch.get_num_threads()
    executor = ThreadPoolExecutor(count, thread_name_prefix=name, initializer=_use_one_torch_thread)
    started = threading.Barrier(count)
    wait([executor.submit(started.wait) for _ in range(count)])
    torch.set_num_threads(before)
    return executor


def _use_one_torch_thread() -> None:
    torch.get_num_threads()  # initialises this thread's number, which the first operation would otherwise reset
    torch.set_num_threads(1)


def in_order(
    work: Callable[[Request], Result], requests: Iterable[Request], *, executor: Executor, depth: int
) -> Generator[Result, None, None]:
    """Yields `work(request)` for each request, in order, with up to `depth` requests in flight.

    Requests are taken from the iterable in the caller's thread, at most `depth` ahead of the last yielded result. An
    exception in `work` is raised where its result would have been yielded. Closing the iterator cancels requests that
    have not started and waits for those that have.
    """
    with contextlib.closing(in_flight(work, requests, executor=executor, depth=depth)) as futures:
        for future in futures:
            yield future.result()


def in_flight(
    work: Callable[[Request], Result], requests: Iterable[Request], *, executor: Executor, depth: int
) -> Generator[Future[Result], None, None]:
    """As `in_order`, but yields the future of each result as soon as `depth` requests are in flight."""
    waiting: deque[Future[Result]] = deque()
    try:
        for request in requests:
            waiting.append(executor.submit(work, request))
            if len(waiting) >= depth:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        _cancel(waiting)


def after(work: Callable[[Request], Result]) -> Callable[[Future[Request]], Result]:
    """`work` on the result of a future, whose exception passes through.

    `in_order(after(second), in_flight(first, ...), ...)` chains two stages: for each request the second starts when the
    first is done, without the caller's thread.
    """
    return lambda future: work(future.result())


def _cancel(waiting: deque[Future[Result]]) -> None:
    """Cancels the futures, then waits for those that already run; their results and exceptions are dropped."""
    for future in waiting:
        future.cancel()
    for future in waiting:
        if not future.cancelled():
            future.exception()
