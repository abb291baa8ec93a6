"""Options that a launcher and `train` both know: one of them counts, or the command is refused."""

import shlex

import pytest
import typer.main
from command_line import error_line, megabatch

from megabatch.cli.launch.command import train_command
from megabatch.cli.main import app
from megabatch.errors import SettingsError

RUN = ["photos", "--output", "runs/a"]
COMMANDS = typer.main.get_command(app).commands
LAUNCHERS = COMMANDS["launch"].commands


def options_of(command):
    return {option for parameter in command.params for option in parameter.opts if option.startswith("--")}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_option_that_a_launcher_and_train_share_is_refused_with_another_value(name):
    needed = ["--image", "i", "--volume", "c:/d"] if name == "kubernetes" else []
    shared = (options_of(LAUNCHERS[name]) & options_of(COMMANDS["train"])) - {"--help"}
    assert "--grace-s" in shared
    for option in shared:
        said = error_line(megabatch("launch", name, *needed, option, 77, "--", *RUN, option, 55))
        assert f"{option} 55 after --" in said


@pytest.mark.parametrize(
    ("option", "works"),
    [
        (["--workers", "4"], "--workers-per-node 4 before -- works"),
        (["--max-restarts=4"], "without it the job works"),
        (["--min-workers", "4"], "without it the job works"),
        (["--resume", "off"], "auto works"),
        (["--resume=off"], "auto works"),
        (["--grace-s"], "--grace-s  after -- differs from the 30 s"),
    ],
)
def test_an_option_that_contradicts_a_job_is_refused(option, works):
    with pytest.raises(SettingsError, match=works):
        train_command([*RUN, *option], cpus_per_worker=8, grace_s=30)


def test_an_option_of_train_replaces_the_one_that_the_launcher_would_give():
    given = ["--threads=2", "--decode-threads", "3", "--resume", "on", "--grace-s", "30"]
    assert train_command([*RUN, *given], cpus_per_worker=8, grace_s=30) == ["train", *RUN, *given]
    usual = shlex.split("--resume auto --threads 8 --decode-threads 8 --grace-s 30")
    assert train_command(RUN, cpus_per_worker=8, grace_s=30) == ["train", "photos", *usual, "--output", "runs/a"]
