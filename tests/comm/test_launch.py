"""Leaving the process groups."""

import hashlib
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes

from megabatch.comm.launch import _wait_for_threads, join

TASKS = Path("/proc/self/task")


@pytest.mark.skipif(not TASKS.exists(), reason="looks at threads by /proc")
def test_leaving_waits_for_threads_that_still_work_and_not_for_those_that_sleep():
    """The stand-in for a thread of gloo works without Python's lock, then needs the lock, then sleeps."""
    named, work, idle, end = (threading.Event() for _ in range(4))

    def live():
        (TASKS / str(threading.get_native_id()) / "comm").write_text("a gloo thread")
        named.set()
        work.wait()
        for _ in range(3):
            hashlib.sha256(bytes(20 << 20)).digest()
        idle.set()
        end.wait()

    thread = threading.Thread(target=live, daemon=True)
    thread.start()
    named.wait()
    work.set()
    _wait_for_threads("a gloo thread", timeout_s=30.0)
    assert idle.is_set()
    _wait_for_threads("a gloo thread", timeout_s=30.0)
    end.set()
    thread.join()


def fail_within_a_world():
    dist.destroy_process_group()  # of the test's own; the block makes one anew
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533", "RANK": "0", "WORLD_SIZE": "1"}
    try:
        with join(device="cpu"):
            raise ArithmeticError
    except ArithmeticError:
        return dist.is_initialized()


@pytest.mark.multiprocess
def test_an_error_leaves_the_world_too():
    assert run_processes(1, fail_within_a_world) == [False]


def test_a_world_leaves_threads_and_denormal_numbers_as_they_were():
    """Else whatever else the process computes would round otherwise from then on."""
    smallest = torch.tensor(sys.float_info.min, dtype=torch.float64)
    before = torch.get_num_threads()
    with join(device="cpu", threads=before + 1):
        assert torch.get_num_threads() == before + 1
        assert smallest / 2 == 0
    assert torch.get_num_threads() == before
    assert smallest / 2 > 0
