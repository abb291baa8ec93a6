import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from limits import HANG_S

from megabatch.data.loading.prefetch import in_order, serial_threads


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def test_results_come_in_the_order_of_requests_however_long_each_takes(threads):
    def slow_at_first(number: int) -> int:
        time.sleep(0.02 if number % 4 == 0 else 0)
        return number

    assert list(in_order(slow_at_first, range(20), executor=threads, depth=4)) == list(range(20))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_requests_are_taken_at_most_depth_ahead_of_the_last_result(threads, depth):
    taken = []

    def requests() -> Iterator[int]:
        for number in range(12):
            taken.append(number)
            yield number

    for number, result in enumerate(in_order(lambda n: n, requests(), executor=threads, depth=depth)):
        assert result == number
        assert len(taken) == min(12, number + depth)


def test_an_exception_is_raised_in_place_of_its_result_and_ends_the_iteration(threads):
    def work(number: int) -> int:
        if number == 3:
            raise RuntimeError("broken at 3")
        return number

    results = in_order(work, range(10), executor=threads, depth=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="broken at 3"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_closing_cancels_queued_requests_and_waits_for_running_ones():
    started, finished, release = [], [], threading.Event()

    def work(number: int) -> int:
        started.append(number)
        if number:
            release.wait(HANG_S)
        finished.append(number)
        return number

    with ThreadPoolExecutor(1) as one_thread:
        results = in_order(work, range(10), executor=one_thread, depth=5)
        assert next(results) == 0
        while started != [0, 1]:
            time.sleep(0.001)
        threading.Timer(0.05, release.set).start()
        results.close()
        assert finished == [0, 1]
    assert started == [0, 1]


def test_no_requests_give_no_results(threads):
    assert list(in_order(lambda n: n, [], executor=threads, depth=3)) == []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to count threads")
def test_torch_starts_no_threads_in_serial_threads_and_as_many_as_before_in_others():
    """torch's own threads would compete with decoding threads for the cores, in every operation."""

    def new_threads_of_an_operation() -> int:
        before = set(os.listdir("/proc/self/task"))
        torch.ones(1 << 20).mul_(2.0)
        return len(set(os.listdir("/proc/self/task")) - before)

    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        serial, others = serial_threads(2, "serial"), ThreadPoolExecutor(1)
        assert torch.get_num_threads() == 3
        together = threading.Barrier(2)
        both = [serial.submit(lambda: (together.wait(), new_threads_of_an_operation())[1]) for _ in range(2)]
        assert [future.result() for future in both] == [0, 0]
        assert [serial.submit(torch.get_num_threads).result() for _ in range(4)] == [1] * 4
        assert others.submit(new_threads_of_an_operation).result() > 0
        serial.shutdown()
        others.shutdown()
    finally:
        torch.set_num_threads(threads)
