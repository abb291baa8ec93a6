"""A worker that dies or freezes causes an error that names it, long before the collectives' timeout."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from limits import HANG_S
from ranks import run_processes

from megabatch.comm import peers
from megabatch.comm.exchange.grid import make_grid
from megabatch.comm.exchange.state import ExchangeState
from megabatch.comm.peers import PeerMonitor
from megabatch.errors import PeerError


def store_of(folder):
    return dist.FileStore(f"{folder}/peers", dist.get_world_size())


def exchange_until_a_peer_is_lost(folder, how, algorithm):
    """Stops rank 3 of 2 x 2; returns the error of each other rank, and after how many seconds."""
    rank, hosts = dist.get_rank(), ["a", "a", "b", "b"]
    with PeerMonitor(store_of(folder), rank=rank, world_size=4, hosts=hosts, timeout_s=10.0) as monitor:
        state = ExchangeState(make_grid(hosts=hosts))
        monitor.on_failure(state.fail)
        state.exchange(torch.ones(100), algorithm).wait()
        dist.barrier()
        if rank == 3:
            time.sleep(0.3)
            os.kill(os.getpid(), how)
        start = time.monotonic()
        try:
            with monitor.guard():
                state.exchange(torch.ones(100), algorithm).wait()
        except PeerError as error:
            return str(error), time.monotonic() - start
    return None


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("how", "algorithm"),
    [
        (signal.SIGKILL, "flat"),
        pytest.param(signal.SIGKILL, "torus", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, "flat", marks=pytest.mark.slow),
        (signal.SIGSTOP, "torus"),
    ],
)
def test_a_killed_or_frozen_peer_is_named_on_every_other_rank_before_the_collectives_timeout(tmp_path, how, algorithm):
    results = run_processes(4, exchange_until_a_peer_is_lost, tmp_path, how, algorithm, may_die=[3])
    for message, seconds in results[:3]:
        assert "rank 3 on host b" in message
        assert seconds < HANG_S  # the timeout of the collectives


def fail_on_rank_one():
    with PeerMonitor.of_job(timeout_s=20.0) as monitor:
        state = ExchangeState(make_grid())
        monitor.on_failure(state.fail)
        dist.barrier()
        if dist.get_rank() == 1:
            raise ZeroDivisionError("no samples")
        state.exchange(torch.ones(3), "flat").wait()


def caught():
    try:
        fail_on_rank_one()
    except (RuntimeError, ZeroDivisionError) as error:
        return str(error)
    return None


@pytest.mark.multiprocess
def test_the_exception_that_ended_a_rank_is_reported_to_the_others():
    assert "rank 1 failed with ZeroDivisionError: no samples" in run_processes(2, caught)[0]


def leave_one_after_the_other(folder):
    with PeerMonitor(store_of(folder), rank=dist.get_rank(), world_size=2, timeout_s=2.0) as monitor:
        failures = []
        monitor.on_failure(failures.append)
        if dist.get_rank() == 0:
            time.sleep(5.0)
    return failures


@pytest.mark.multiprocess
def test_a_rank_that_ended_normally_is_not_reported(tmp_path):
    assert run_processes(2, leave_one_after_the_other, tmp_path) == [[], []]


def monitor_of_two():
    return PeerMonitor(dist.HashStore(), rank=0, world_size=2, timeout_s=0.2)


def test_an_error_without_communication_passes_the_guard_unchanged():
    with pytest.raises(RuntimeError, match="shape"), monitor_of_two().guard():
        raise RuntimeError("shape [2] is invalid")


def test_a_failed_connection_to_a_silent_peer_becomes_a_peer_error():
    with pytest.raises(PeerError, match=r"rank 1 has stopped answering.*Connection closed"), monitor_of_two().guard():
        raise RuntimeError("Connection closed by peer [10.0.0.2]:99")


class FrozenStore:
    """As a store whose host was stopped: from `freeze` on no request returns."""

    def __init__(self):
        self.freeze = threading.Event()
        self.counts = {}

    def add(self, key, amount):
        if self.freeze.is_set():
            threading.Event().wait()
        self.counts[key] = self.counts.get(key, 0) + amount
        return self.counts[key]

    def check(self, keys):
        return self.add(keys[0], 0) > 0


def test_a_store_that_answers_no_request_is_a_failure_and_a_stuck_process_is_ended(monkeypatch):
    store, failures, ended = FrozenStore(), [], threading.Event()
    monkeypatch.setattr(peers, "PrefixStore", lambda _, store: store)
    monitor = PeerMonitor(store, rank=0, world_size=2, timeout_s=0.5, on_stuck=lambda _: ended.set())
    monitor.on_failure(failures.append)
    monitor.__enter__()
    time.sleep(1.0)
    assert not failures
    store.freeze.set()
    assert ended.wait(HANG_S)
    assert [str(error) for error in failures] == [f"{peers._STORE_LOST}, or is frozen"]
