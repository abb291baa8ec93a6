"""A peer that dies, hangs or never comes gives an error that names it, in time."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes

from megabatch.comm.exchange.grid import make_grid
from megabatch.comm.exchange.state import ExchangeState
from megabatch.comm.peers import PeerMonitor, gather_hosts, host_name, interface_towards
from megabatch.errors import PeerError, SettingsError


def store_of(folder):
    return dist.FileStore(f"{folder}/peers", dist.get_world_size())


def exchange_until_a_peer_is_lost(folder, how, algorithm):
    """Rank 3 of 2 x 2 goes; what the others are told, and after how many seconds. A minute is the group's timeout."""
    rank, hosts = dist.get_rank(), ["a", "a", "b", "b"]
    with PeerMonitor(store_of(folder), rank=rank, world_size=4, hosts=hosts, timeout_s=3.0) as monitor:
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
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("algorithm", ["flat", "torus"])
def test_a_killed_or_frozen_peer_is_named_on_every_other_rank_long_before_the_collectives_timeout(
    tmp_path, how, algorithm
):
    results = run_processes(4, exchange_until_a_peer_is_lost, tmp_path, how, algorithm, may_die=[3])
    for message, seconds in results[:3]:
        assert "rank 3 on host b" in message
        assert seconds < 30


def fail_on_rank_one():
    with PeerMonitor.of_job(timeout_s=20.0, generation=1) as monitor:
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
def test_the_error_that_ended_a_peer_is_told_to_the_others():
    assert "rank 1 failed with ZeroDivisionError: no samples" in run_processes(2, caught)[0]


def leave_one_after_the_other(folder):
    with PeerMonitor(store_of(folder), rank=dist.get_rank(), world_size=2, timeout_s=0.4) as monitor:
        failures = []
        monitor.on_failure(failures.append)
        if dist.get_rank() == 0:
            time.sleep(1.5)
    return failures


@pytest.mark.multiprocess
def test_a_peer_that_ended_as_planned_is_not_missed(tmp_path):
    assert run_processes(2, leave_one_after_the_other, tmp_path) == [[], []]


def test_a_peer_that_never_comes_is_named():
    store = dist.HashStore()
    gathering = pytest.raises(PeerError, match=r"1 of 2 ranks did not come within 0.2 s: ranks 1;")
    with gathering:
        gather_hosts(store, 0, 2, timeout_s=0.2)


def test_hosts_come_in_rank_order():
    store = dist.HashStore()
    store.set("host/1", "b")
    assert gather_hosts(store, 0, 2, host="a") == ["a", "b"]
    assert gather_hosts(dist.HashStore(), 0, 1) == [host_name()]


def monitor_of_two():
    return PeerMonitor(dist.HashStore(), rank=0, world_size=2, timeout_s=0.2)


def test_an_error_of_the_programs_own_passes_the_guard_unchanged():
    with pytest.raises(RuntimeError, match="shape"), monitor_of_two().guard():
        raise RuntimeError("shape [2] is invalid")


def test_a_failed_connection_to_a_silent_peer_becomes_a_peer_error():
    with pytest.raises(PeerError, match=r"rank 1 has stopped answering.*Connection closed"), monitor_of_two().guard():
        raise RuntimeError("Connection closed by peer [10.0.0.2]:99")


def test_the_interface_towards_this_machine_is_loopback_and_a_bad_name_is_refused():
    assert interface_towards("127.0.0.1") == "lo"
    with pytest.raises(SettingsError, match="no route to the rendezvous"):
        interface_towards("host.invalid")
