"""Work done ahead in background threads, handed over in order."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from typing import TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
