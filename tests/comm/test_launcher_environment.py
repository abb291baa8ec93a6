"""Descriptions of a worker in the environment: complete ones, half ones and nonsense."""

import socket

import pytest

from megabatch.comm import launcher_environment
from megabatch.comm.launch import join
from megabatch.comm.launcher_environment import (
    Launched,
    check_interface,
    check_open_files,
    read_launcher,
    started_by_launcher,
)
from megabatch.comm.local_workers import run_local_workers
from megabatch.errors import SettingsError

COMPLETE = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
OTHERS = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly these of the launcher's variables."""

    def set_environment(**values: str) -> None:
        for name in (*COMPLETE, *OTHERS):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_environment


def test_a_complete_description_is_read(environment):
    environment(**COMPLETE)
    assert started_by_launcher()
    assert read_launcher() == Launched(3, 4, 0, 1)
    environment(**COMPLETE, LOCAL_RANK="1", LOCAL_WORLD_SIZE="2")
    assert read_launcher() == Launched(3, 4, 1, 2)


def test_another_number_of_workers_than_the_launcher_started_is_refused(environment, monkeypatch):
    environment(**COMPLETE, LOCAL_WORLD_SIZE="2")
    assert started_by_launcher(2)
    with pytest.raises(SettingsError, match=r"--workers 4 was given, but a launcher .* started 2 on this host"):
        started_by_launcher(4)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "megabatch-1")  # `train --workers 4`, which lost two
    assert started_by_launcher(4)


def test_too_few_open_files_are_refused_before_any_worker_starts(monkeypatch):
    monkeypatch.setattr(launcher_environment, "max_open_files", lambda: 24)
    for start in (check_open_files, lambda: run_local_workers(2, ["train", "photos"])):
        with pytest.raises(SettingsError, match=r"24 open files are allowed.*`ulimit -n 4096` allows more"):
            start()


def test_without_rank_and_world_size_no_launcher_is_assumed(environment):
    environment(LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    assert not started_by_launcher()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"WORLD_SIZE": None}, "RANK=3 is set without WORLD_SIZE"),
        ({"RANK": None}, "WORLD_SIZE=4 is set without RANK"),
        ({"MASTER_ADDR": None}, "without MASTER_ADDR"),
        ({"MASTER_PORT": None}, "without MASTER_PORT"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT=abc was given, needed a whole number from 1 to 65535"),
        ({"RANK": "abc"}, "RANK=abc was given, needed a whole number from 0 to 3"),
        ({"RANK": "4"}, "RANK=4 was given"),
        ({"RANK": "-1"}, "RANK=-1 was given"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 was given, needed a whole number of at least 1"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1 was given, needed 0,"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
        ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
    ],
)
def test_half_a_description_or_nonsense_is_refused(environment, changes, said):
    given = {name: value for name, value in (COMPLETE | changes).items() if value is not None}
    environment(**given)
    with pytest.raises(SettingsError, match=said), join(device="cpu"):
        pass


def test_a_port_in_use_is_refused(environment):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        environment(**COMPLETE | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(taken.getsockname()[1])})
        with pytest.raises(SettingsError, match="is in use by another program"), join(device="cpu"):
            pass


@pytest.mark.parametrize(
    ("backend", "wanted", "fits"),
    [
        ("gloo", "", True),
        ("gloo", "eth0", True),
        ("gloo", "lo,eth0", True),
        ("gloo", "eth", False),
        ("gloo", "lo,ib0", False),
        ("nccl", "eth", True),
        ("nccl", "ib,eth", True),
        ("nccl", "=eth0", True),
        ("nccl", "=eth", False),
        ("nccl", "ib", False),
        ("nccl", "^docker", True),
    ],
)
def test_an_interface_of_another_machine_is_refused_with_those_there_are(monkeypatch, backend, wanted, fits):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0")])
    monkeypatch.setenv(f"{backend.upper()}_SOCKET_IFNAME", wanted)
    if fits:
        check_interface(backend)
        return
    with pytest.raises(SettingsError, match=rf"{backend.upper()}_SOCKET_IFNAME={wanted} .* has lo, eth0; unset"):
        check_interface(backend)
