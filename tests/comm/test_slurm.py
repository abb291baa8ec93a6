"""A task of srun describes itself as torchrun would."""

import os

import pytest

from megabatch.comm.launcher_environment import Launched, read_launcher, started_by_launcher
from megabatch.comm.slurm import adopt_slurm_task, first_host, tasks_per_node
from megabatch.errors import SettingsError

TASK = {
    "SLURM_JOB_ID": "81234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[007-008,11]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    """Sets these variables, and restores all that `adopt_slurm_task` may set."""

    def set_environment(**values):
        for name in (*LAUNCHER, *TASK, "TORCHELASTIC_RESTART_COUNT"):
            monkeypatch.setenv(name, "")  # so that it is restored
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_environment


def test_a_task_of_several_is_a_worker(environment, monkeypatch):
    environment(**TASK)
    adopt_slurm_task()
    assert started_by_launcher()
    assert read_launcher() == Launched(rank=3, world_size=5, local_rank=1, local_world_size=2)
    assert os.environ["MASTER_ADDR"] == "gpu007"
    assert 12_000 <= int(os.environ["MASTER_PORT"]) < 30_000


def test_address_and_port_of_the_user_are_kept(environment):
    environment(**TASK, MASTER_ADDR="10.0.0.1", MASTER_PORT="4000")
    adopt_slurm_task()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "4000")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        TASK | {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # the batch script itself
    ],
)
def test_a_single_task_or_a_batch_script_is_no_worker(environment, variables):
    environment(**variables)
    adopt_slurm_task()
    assert not started_by_launcher()


def test_the_variables_of_torchrun_win(environment):
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    environment(**TASK, **torchrun)
    adopt_slurm_task()
    assert read_launcher().world_size == 1


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_STEP_NODELIST"])
def test_an_incomplete_description_is_refused(environment, missing):
    environment(**{name: value for name, value in TASK.items() if name != missing})
    with pytest.raises(SettingsError, match="torchrun"):
        adopt_slurm_task()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-2]", "n1"), ("a-[07,09-12]-ib,b", "a-07-ib"), ("x.y.z,n[1-2]", "x.y.z")],
)
def test_the_first_node_of_slurms_lists(nodes, first):
    assert first_host(nodes) == first


def test_tasks_per_node_of_slurms_lists():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]
