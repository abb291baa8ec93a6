"""The `megabatch` command: its verbs, and how errors reach a person (one line, and the exit code)."""

import contextlib
import itertools
import os
import sys
from dataclasses import fields
from types import FrameType

import typer

from megabatch import __version__
from megabatch.cli.bench.allreduce import bench_allreduce
from megabatch.cli.bench.input import bench_input
from megabatch.cli.bench.step import bench_step
from megabatch.cli.completion import join_bash_words
from megabatch.cli.data import data_app
from megabatch.cli.doctor import doctor
from megabatch.cli.failure import as_megabatch_error, report
from megabatch.cli.launch.kubernetes import launch_kubernetes
from megabatch.cli.launch.ray import launch_ray
from megabatch.cli.launch.slurm import launch_slurm
from megabatch.cli.output import open_output
from megabatch.cli.plan import plan
from megabatch.cli.recipes import recipes
from megabatch.cli.results.evaluate import evaluate
from megabatch.cli.results.export import export
from megabatch.cli.results.mllog import mllog
from megabatch.cli.results.predict import predict
from megabatch.cli.results.report import report as write_report
from megabatch.cli.results.watch import watch
from megabatch.cli.train import train
from megabatch.comm.local_workers import handling
from megabatch.comm.slurm import adopt_slurm_task
from megabatch.comm.worker_watch import start_beating
from megabatch.errors import SettingsError
from megabatch.files import raise_open_file_limit
from megabatch.recipe import Recipe
from megabatch.recipe_text import COMMON_NAMES
from megabatch.runtime import Runtime

app = typer.Typer(
    name="megabatch",
    help="Trains image classifiers to full accuracy with extremely large minibatches. Batch sizes are global, always.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(evaluate)
app.command()(predict)
app.command()(export)
app.command()(recipes)
app.command()(plan)
app.command("report")(write_report)
app.command()(watch)
app.command()(doctor)
app.command()(mllog)
app.add_typer(data_app, name="data")

bench_app = typer.Typer(help="Measure parts of training here.", no_args_is_help=True, rich_markup_mode=None)
bench_app.command("allreduce")(bench_allreduce)
bench_app.command("input")(bench_input)
bench_app.command("step")(bench_step)
app.add_typer(bench_app, name="bench")


launch_app = typer.Typer(help="Train on clusters.", no_args_is_help=True, rich_markup_mode=None)
launch_app.command("kubernetes")(launch_kubernetes)
launch_app.command("ray")(launch_ray)
launch_app.command("slurm")(launch_slurm)
app.add_typer(launch_app, name="launch")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"megabatch {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Show the version."),
) -> None:
    """Options of the command itself."""


def main() -> None:
    """Runs the command line; ends the process with its exit code."""
    start_beating()
    open_output()
    raise_open_file_limit()
    _limit_spinning()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings repeat what an error says in one line
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # a file in the current folder shadows no module of child processes
    sys.argv[1:] = [_expand_home(argument) for argument in _with_resume_value(sys.argv[1:])]
    join_bash_words(os.environ)
    try:
        adopt_slurm_task()
        # A worker that waits for others in C++ code would not notice: there the signals keep their default action.
        with contextlib.nullcontext() if "RANK" in os.environ else handling(_interrupt):
            _refuse_empty(sys.argv[1:])
            _refuse_recipe_keys(sys.argv[1:])
            app()
    except KeyboardInterrupt:  # the second Ctrl-C of a run
        sys.exit(1)
    except Exception as error:
        expected = as_megabatch_error(error)
        if expected is None:
            raise
        sys.exit(report(expected))


def _interrupt(number: int, _: FrameType | None) -> None:
    """Ends a verb in such a way that it removes its temporary files; training and local workers handle signals too."""
    sys.exit(128 + number)


def _refuse_empty(arguments: list[str]) -> None:
    """Refuses empty arguments, such as --data "$UNSET": an empty path is the current folder."""
    for before, argument in itertools.pairwise(["megabatch", *arguments]):
        option, equals, value = argument.partition("=")
        if not argument or (option.startswith("--") and equals and not value):
            raise SettingsError(
                f"the argument {option if equals else 'after ' + before} is empty, maybe as a shell variable is not "
                "set; a value is needed, and . is the current folder"
            )


def _refuse_recipe_keys(arguments: list[str]) -> None:
    """Refuses a key of the recipe as an option of `train`, as --epochs 3, with the --set that works."""
    keys = {field.name for field in fields(Recipe)} - {field.name for field in fields(Runtime)}
    for argument in arguments if arguments[:1] == ["train"] else []:
        option, _, value = argument.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        key = COMMON_NAMES.get(name, name)
        if option.startswith("--") and key in keys:
            raise SettingsError(f"{option} is no option, as recipes hold it; --set {key}={value or 'VALUE'} works")


def _with_resume_value(arguments: list[str]) -> list[str]:
    """Replaces `--resume` without one of its values by `--resume=on`: typer has no option with an optional value."""
    following = [*arguments[1:], ""]  # one more than none, if there are no arguments
    return [
        "--resume=on" if argument == "--resume" and after not in {"on", "off", "auto"} else argument
        for argument, after in zip(arguments, following, strict=False)
    ]


def _expand_home(argument: str) -> str:
    """Expands `~` in `~/path` and `--option=~/path`, which a shell leaves as it is in quotes and behind a sign."""
    if argument.startswith("~"):
        return os.path.expanduser(argument)
    option, equals, value = argument.partition("=")
    is_path = option.startswith("--") and value.startswith("~")
    return f"{option}{equals}{os.path.expanduser(value)}" if is_path else argument


def _limit_spinning() -> None:
    """Makes waiting OpenMP threads sleep after some microseconds, unless the user configured them.

    By default they spin for milliseconds. On a core that a loader thread or another process needs, a spinning thread
    delays the thread it waits for: a net of small layers took up to 20 times as long. On an idle machine 3,000 rounds
    of spinning cost nothing, and 1,000 cost such a net 7 %. OpenMP reads the setting when torch is loaded, which no
    verb has done yet.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
