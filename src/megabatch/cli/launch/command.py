"""The command line of `megabatch train` that a job runs, and options that all launchers share."""

from collections.abc import Sequence
from typing import Annotated

import typer

from megabatch import recipes
from megabatch.errors import SettingsError

Arguments = Annotated[
    list[str], typer.Argument(metavar="-- RECIPE OPTIONS...", help="Arguments of `megabatch train`, after `--`.")
]
Nodes = Annotated[int, typer.Option(help="Number of nodes.", min=1)]
GpusPerNode = Annotated[int, typer.Option(help="GPUs per node, a worker on each; 0 trains on CPUs.", min=0)]
WorkersPerNode = Annotated[int | None, typer.Option(help="Workers per node; default one per GPU, or one.", min=1)]
CpusPerWorker = Annotated[int, typer.Option(help="CPU cores per worker, which also decode images.", min=1)]
GraceS = Annotated[int, typer.Option(help="Seconds to write a checkpoint when the job must end.", min=1)]

_LOCAL_ONLY = {
    "--workers": "--workers-per-node {} before -- works",
    "--max-restarts": "without it the job works; `launch kubernetes` has --max-restarts before --",
    "--min-workers": "without it the job works",
}
"""Options of `train` for workers that it starts itself, which no launcher lets it do, and what works."""


def train_command(arguments: Sequence[str], *, cpus_per_worker: int, grace_s: int) -> list[str]:
    """Returns `train RECIPE ...` of a job that is continued after a restart and has `grace_s` to end.

    Of the options that a launcher sets, --threads and --decode-threads after `--` win.

    Raises:
        RecipeError: there is no such recipe.
        SettingsError: the run's folder is missing, or an option after `--` contradicts the launcher.
    """
    recipe, *options = arguments
    recipes.get(recipe)
    given = _given(options)
    if "--output" not in given:
        raise SettingsError("a job that is continued needs the folder of its run; --output /shared/runs/NAME works")
    _refuse_contradictions(given, grace_s)
    cores = str(cpus_per_worker)
    chosen = {"--resume": "auto", "--threads": cores, "--decode-threads": cores, "--grace-s": str(grace_s)}
    return ["train", recipe, *(word for name in chosen if name not in given for word in (name, chosen[name])), *options]


def _given(options: Sequence[str]) -> dict[str, str]:
    """Values of the options `--name=VALUE` and `--name VALUE`; "" where another option follows or nothing."""
    given = {}
    for word, after in zip(options, [*options[1:], "--"], strict=False):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            given[name] = value if equals or after.startswith("--") else after
    return given


def _refuse_contradictions(given: dict[str, str], grace_s: int) -> None:
    for option, works in _LOCAL_ONLY.items():
        if option in given:
            raise SettingsError(
                f"{option} {given[option]} after -- is for workers that `train` starts itself; "
                + works.format(given[option])
            )
    if given.get("--resume") == "off":
        raise SettingsError("--resume off after --: a job that is started again must continue its run; auto works")
    value = given.get("--grace-s", str(grace_s))
    if value not in {str(grace_s), f"{grace_s}.0"}:
        raise SettingsError(
            f"--grace-s {value} after -- differs from the {grace_s} s for which the launcher waits; "
            f"before --, as --grace-s {grace_s}, it sets both"
        )


def num_workers(gpus_per_node: int, workers_per_node: int | None) -> int:
    """Returns the workers of a node; SettingsError unless each has a GPU where the node has any."""
    workers = workers_per_node or gpus_per_node or 1
    if gpus_per_node and workers != gpus_per_node:
        raise SettingsError(
            f"--workers-per-node {workers} with {gpus_per_node} GPUs: needed one worker per GPU; "
            f"--workers-per-node {gpus_per_node} works"
        )
    return workers
