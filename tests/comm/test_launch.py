"""Shutdown of the process groups, and the state that `join` restores."""

import hashlib
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from limits import HANG_S
from ranks import free_port, run_processes, run_threads

from megabatch.comm import launch
from megabatch.comm.launch import World, _wait_for_threads, join, on_rank0
from megabatch.cores import usable_cores
from megabatch.errors import DataError, MegabatchError, PeerError, SettingsError

TASKS = Path("/proc/self/task")


@pytest.mark.skipif(not TASKS.exists(), reason="reads the states of threads from /proc")
def test_shutdown_waits_for_busy_threads_but_not_for_sleeping_ones():
    """The mock of a gloo thread works without the GIL, then acquires it, then sleeps."""
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
    _wait_for_threads("a gloo thread", timeout_s=HANG_S)
    assert idle.is_set()
    _wait_for_threads("a gloo thread", timeout_s=HANG_S)
    end.set()
    thread.join()


def fail_within_a_world(port):
    dist.destroy_process_group()  # the test's group; `join` creates a new one
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}
    try:
        with join(device="cpu"):
            raise ArithmeticError
    except ArithmeticError:
        return dist.is_initialized()


@pytest.mark.multiprocess
def test_an_error_destroys_the_process_group_too():
    assert run_processes(1, fail_within_a_world, free_port()) == [False]


def test_join_restores_the_threads_and_the_denormal_mode():
    """Otherwise later computations of the process would round differently."""
    smallest = torch.tensor(sys.float_info.min, dtype=torch.float64)
    before = torch.get_num_threads()
    with join(device="cpu", threads=before + 1):
        assert torch.get_num_threads() == before + 1
        assert smallest / 2 == 0
    assert torch.get_num_threads() == before
    assert smallest / 2 > 0


@pytest.mark.parametrize(
    ("environment", "threads", "expected"),
    [("3", None, 3), ("3", 2, 2), ("3,2", None, 3), ("many", None, usable_cores()), ("", None, usable_cores())],
)
def test_threads_are_as_given_else_as_in_the_environment_else_one_per_core(monkeypatch, environment, threads, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", environment)
    with join(device="cpu", threads=threads):
        assert torch.get_num_threads() == expected


def decide(error):
    def work():
        if error is not None:
            raise error
        return f"decided on rank {dist.get_rank()}"

    world = World(dist.get_rank(), dist.get_world_size())
    try:
        return on_rank0(work, world)
    except (MegabatchError, OSError) as raised:
        return type(raised), str(raised)


def test_a_decision_of_rank_0_or_its_error_reaches_every_rank():
    assert run_threads(3, decide, None) == ["decided on rank 0"] * 3
    assert run_threads(3, decide, DataError("no images")) == [(DataError, "no images")] * 3
    assert {kind for kind, _ in run_threads(3, decide, PermissionError(13, "denied", "/a"))} == {PermissionError}


def lose_rank_1(port):
    dist.destroy_process_group()  # the test's group; `join` creates a new one
    rank = os.environ["RANK"]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    try:
        with join(device="cpu"):
            dist.barrier()
            if rank == "1":
                os._exit(1)
            dist.all_reduce(torch.ones(1))
    except PeerError as error:
        return str(error)
    return None


@pytest.mark.multiprocess
def test_a_lost_connection_is_a_peer_error():
    assert "the connection to another worker was lost" in run_processes(2, lose_rank_1, free_port(), may_die=[1])[0]


def test_an_apple_gpu_is_refused_where_there_is_none():
    with pytest.raises(SettingsError, match=r"no Apple GPU; --device cpu works"), join(device="mps"):
        pass


def test_an_apple_gpu_is_taken_by_a_worker_that_is_alone(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for wanted in ("auto", "mps"):
        with join(device=wanted) as world:
            assert world.device == torch.device("mps")
    with join(device="cpu") as world:
        assert world.device.type == "cpu"
    assert launch._device("auto", 1, 2, 2).type == "cpu"
    with pytest.raises(SettingsError, match="trains one worker, 2 were started; --workers 1 works"):
        launch._device("mps", 1, 2, 2)
