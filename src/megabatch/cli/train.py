"""`megabatch train RECIPE`: starts local workers, or joins those that torchrun started."""

import contextlib
import dataclasses
import functools
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from megabatch import recipes
from megabatch.cli.completion import complete_recipe
from megabatch.cli.failure import one_line
from megabatch.cli.options import Settings, find_device, parse_settings, runtime_options
from megabatch.errors import STOPPED, SettingsError
from megabatch.files import create_unused, write_text
from megabatch.observe.run_folder import holds_run, require_no_run
from megabatch.recipe import Recipe, from_json, override
from megabatch.recipe_file import SUFFIX
from megabatch.runtime import Runtime
from megabatch.train.recipe_warnings import warnings_for
from megabatch.user_code import is_function, short_name

if TYPE_CHECKING:
    from megabatch.app.data import Data
    from megabatch.data.loading.train_loader import TrainLoader


@runtime_options()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Recipe, or recipe file (.toml); `megabatch recipes` lists them.", autocompletion=complete_recipe
        ),
    ],
    runtime: Runtime,
    settings: Settings = None,
    steps: Annotated[
        int | None, typer.Option(help="Number of updates after which to evaluate, save and stop.", min=1)
    ] = None,
    dry_run: Annotated[
        int | None,
        typer.Option(help="Run this many updates, keep nothing, and say what a whole run would take.", min=1),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only warnings and the last line.")] = False,
) -> None:
    """Trains a recipe. The last line shows the top-1 accuracy and the report's path."""
    given = parse_settings(settings or [])
    chosen = _with_initial_weights(override(recipes.get(recipe), given | _model_setting(runtime, given)), runtime)
    file = Path(recipe) if recipe.endswith(SUFFIX) else None
    request = Request(steps, dry_run, file, quiet=quiet, may_drop_colour="image_channels" in given)
    _train(chosen, runtime, request)


@dataclass(frozen=True)
class Request:
    """What one call of `train` asks for, besides recipe and runtime."""

    steps: int | None
    dry_run: int | None
    file: Path | None  # the recipe's
    quiet: bool
    may_drop_colour: bool

    @property
    def max_steps(self) -> int | None:
        """Updates after which to stop."""
        return self.dry_run or self.steps

    def open_data(self, recipe: Recipe, runtime: Runtime, **options: Any) -> "Data":
        """Opens the data, which a dry run may do without."""
        from megabatch.app.data import open_data
        from megabatch.app.dry_run import open_dry_data

        return (open_dry_data if self.dry_run else open_data)(recipe, runtime, **options)


def _model_setting(runtime: Runtime, given: dict[str, str]) -> dict[str, str]:
    """The recipe setting that --model stands for. A file's folder differs between machines and is left out."""
    for key, option in (("model", runtime.model), ("initial_weights", "FILE")):
        if key in given and option is not None:
            flag = "--model" if key == "model" else "--init-from"
            raise SettingsError(f"--set {key}={given[key]} was given; {flag} {option} alone works")
    return (
        {"model": short_name(runtime.model) if is_function(runtime.model) else runtime.model} if runtime.model else {}
    )


def _with_initial_weights(recipe: Recipe, runtime: Runtime) -> Recipe:
    """The recipe with the digest of the initial weights, so that a run resumes only with the same."""
    if runtime.init_from is None:
        return recipe
    from megabatch.app.initial_weights import weights_digest

    return dataclasses.replace(recipe, initial_weights=weights_digest(runtime.init_from))


def _train(recipe: Recipe, runtime: Runtime, request: Request) -> None:
    from megabatch.app.dry_run import check_dry_run
    from megabatch.comm.launcher_environment import started_by_launcher
    from megabatch.comm.local_workers import Recovery, run_local_workers

    if request.dry_run:
        check_dry_run(request.dry_run, runtime)
    if started_by_launcher(runtime.workers):
        _work(recipe, runtime, None, request)
        return
    _check_output(runtime)
    num_workers = _check_before_start(recipe, runtime, request)
    with _run_folder(recipe, runtime, request) as folder:
        if num_workers == 1:
            _work(recipe, runtime, folder, dataclasses.replace(request, may_drop_colour=True))  # checked above
            return
        arguments = [*_without_option(sys.argv[1:], "--output"), "--output", str(folder)]
        last_step = (_newest_step(folder) or 0) + request.steps if request.steps else None
        recovery = Recovery(
            max_restarts=runtime.max_restarts,
            min_workers=runtime.min_workers,
            progress=lambda: _newest_step(folder),
            restarted=functools.partial(_restarted, folder=folder, last_step=last_step),
            announce=lambda text: typer.echo(f"megabatch: {one_line(text)}", err=True),
        )
        code = run_local_workers(
            num_workers, arguments, recovery=recovery, silent_s=runtime.peer_timeout_s, grace_s=runtime.grace_s
        )
        if code:
            raise typer.Exit(code)


def _restarted(arguments: Sequence[str], *, folder: Path, last_step: int | None) -> list[str]:
    """Arguments of workers that continue the run of a command that ends at `last_step`; at least one step remains."""
    if last_step is None:
        return [*arguments, "--resume"]
    left = max(1, last_step - (_newest_step(folder) or 0))
    return [*_without_option(arguments, "--steps"), "--steps", str(left), "--resume"]


def _newest_step(folder: Path) -> int | None:
    """Step of the newest checkpoint of a run, or None; no torch."""
    return max((int(path.stem.removeprefix("step-")) for path in folder.glob("checkpoints/step-*.json")), default=None)


def _check_before_start(recipe: Recipe, runtime: Runtime, request: Request) -> int:
    """Returns the number of local workers; reports invalid input before anything is written."""
    from megabatch.app.data import check_room, fit_to_data
    from megabatch.app.image_checks import refuse_colour_as_grey
    from megabatch.app.initial_weights import match_weights, read_weights
    from megabatch.app.model import make_model
    from megabatch.app.resolve import check, default_workers
    from megabatch.comm.launch import World

    device = find_device(runtime.device)
    with contextlib.closing(request.open_data(recipe, runtime, on_progress=_say, probe=True)) as data:
        if not request.may_drop_colour:
            refuse_colour_as_grey(recipe, data)
        fitted = fit_to_data(recipe, data)
        num_workers = runtime.workers or default_workers(fitted, runtime)
        check_room(fitted, runtime, data, world=World(world_size=num_workers, local_world_size=num_workers))
        if runtime.resume and runtime.output:
            _check_resumed(fitted, data, runtime.output)
    check(fitted, runtime, world_size=num_workers, device=device)
    if runtime.init_from:
        match_weights(make_model(fitted, runtime.model), read_weights(runtime.init_from))
    return num_workers


def _check_resumed(recipe: Recipe, data: "Data", folder: Path) -> None:
    """Raises DataError or CheckpointError if the run to resume has other classes or another recipe."""
    from megabatch.app.classes import match_training_data
    from megabatch.app.state import refuse_other_recipe
    from megabatch.train.checkpoint import list_checkpoints

    for newest in list_checkpoints(folder / "checkpoints")[-1:]:
        match_training_data(data, newest)
        refuse_other_recipe(recipe, from_json(newest.recipe))


def _work(recipe: Recipe, runtime: Runtime, output: Path | None, request: Request) -> None:
    """Runs one worker process: join, open the data, build the run, train, report."""
    import torch

    from megabatch.app.data import check_room, fit_to_data
    from megabatch.app.dry_run import estimate
    from megabatch.app.image_checks import image_remarks, refuse_colour_as_grey
    from megabatch.app.run import open_run
    from megabatch.comm.launch import join, on_rank0, sum_over_workers
    from megabatch.data.sources.made import MadePhotos
    from megabatch.train.loop import train as run_loop

    with (
        join(device=runtime.device, timeout_s=runtime.timeout_s, threads=runtime.threads) as world,
        _stop_on_signal(runtime.grace_s, is_first=world.is_first) as stop_requested,
        contextlib.closing(request.open_data(recipe, runtime)) as data,
        contextlib.ExitStack() as stack,
    ):
        if not request.may_drop_colour:
            refuse_colour_as_grey(recipe, data)
        folder = output or on_rank0(
            lambda: stack.enter_context(_run_folder(recipe, runtime, request, launched=True)), world
        )
        fitted = fit_to_data(recipe, data)
        check_room(fitted, runtime, data, world=world)
        started = time.perf_counter()
        with open_run(
            fitted,
            runtime,
            data,
            world=world,
            folder=folder,
            stop_requested=stop_requested,
            max_steps=request.max_steps,
            quiet=request.quiet,
        ) as run:
            for warning in [*warnings_for(fitted), *(image_remarks(fitted, data) if world.is_first else ())]:
                run.log({"event": "warning", "text": warning})
            if request.file and world.is_first:
                write_text(folder / "recipe.toml", request.file.read_text(encoding="utf-8"))  # with its comments
            first_sample = run.state.samples_seen
            evaluation = run_loop(run)
            seconds = time.perf_counter() - started
            images_per_s = (run.state.samples_seen - first_sample) / seconds
            top1 = evaluation.top1 if evaluation else None
            loader = cast("TrainLoader", run.loader)
            replaced = int(sum_over_workers(torch.tensor(loader.num_replaced, device=world.device), world))
            end = {"event": "run_end", "top1": top1, "images_per_s": images_per_s, "train_s": seconds}
            run.log(end | {"num_replaced_samples": replaced})
        complete = run.is_complete
        if world.is_first:
            if request.dry_run:
                _say(estimate(fitted, folder, is_made=isinstance(data.train, MadePhotos)))
            else:
                _finish(folder, top1, images_per_s, seconds, run.state.step, complete=complete, quiet=request.quiet)
        if evaluation is None and not complete:
            raise typer.Exit(STOPPED)


def _finish(
    folder: Path, top1: float | None, images_per_s: float, seconds: float, step: int, *, complete: bool, quiet: bool
) -> None:
    """Writes the report and prints the result; without an accuracy the run was stopped, or was already complete."""
    from megabatch.observe.report import write_report

    report = write_report([folder], folder / "report.html")
    if top1 is None and complete:
        _say(f"already complete at step {step:,}; `megabatch evaluate {shlex.quote(str(folder))}` evaluates it again")
        return
    if top1 is None:
        _say(f"stopped at step {step:,}; the same command with --output {shlex.quote(str(folder))} --resume continues")
        return
    if not quiet:
        _say(f"trained for {seconds:.1f} s, including evaluations; run folder {folder}, report {report}")
    _say(f"top1 {top1:.4f}  {images_per_s:,.0f} images/s  report {report}")


@contextlib.contextmanager
def _run_folder(recipe: Recipe, runtime: Runtime, request: Request, *, launched: bool = False) -> Iterator[Path]:
    """Yields --output, or a new folder named after the recipe and the time, which is removed if it stays empty.

    A dry run without --output gets a temporary folder.
    """
    _check_output(runtime, may_start=launched)
    if runtime.output is not None:
        yield runtime.output
        return
    if request.dry_run:
        with tempfile.TemporaryDirectory(prefix="megabatch-dry-run-") as temporary:
            yield Path(temporary)
        return
    folder = create_unused(Path("runs") / f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # it holds a run
            folder.rmdir()


def _check_output(runtime: Runtime, *, may_start: bool = False) -> None:
    """Raises SettingsError if the run cannot start, or resume, in --output.

    `--resume auto`, and under a launcher (`may_start`) also `--resume`, accept a folder without a run, so that one
    command both starts a job and continues it after a requeue.
    """
    output = runtime.output
    if output is None:
        if runtime.resume:
            raise SettingsError("--resume needs the folder of the run; --output runs/NAME names it")
        return
    if output.exists() and not output.is_dir():
        raise SettingsError(f"--output {output} is a file; a new or empty folder works")
    if runtime.resume is True and not may_start and not holds_run(output):
        raise SettingsError(f"{output} holds no run to resume; --resume auto, or no --resume, starts a new run there")
    if not runtime.resume:
        require_no_run(output)


def _without_option(arguments: Sequence[str], option: str) -> list[str]:
    """`arguments` without `option VALUE` and `option=VALUE`."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith(f"{option}="):
            skip = False
            continue
        if argument == option:
            skip = True
            continue
        kept.append(argument)
    return kept


@contextlib.contextmanager
def _stop_on_signal(grace_s: float, *, is_first: bool) -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT, SIGTERM and SIGHUP stop training at the next step, as does the end of the parent.

    The process ends `grace_s` after the first signal at the latest, and at once at a second one. Signals that the
    process ignores, as `nohup` makes it do, stay ignored.
    """
    from megabatch.comm.local_workers import REPEAT_S, handling
    from megabatch.comm.worker_watch import parent_has_died

    requested_at: list[float] = []
    timers: list[threading.Timer] = []

    def end_after(seconds: float) -> None:
        timers.append(threading.Timer(seconds, os._exit, [STOPPED]))
        timers[-1].daemon = True
        timers[-1].start()

    def request_stop(number: int, _: FrameType | None) -> None:
        requested_at.append(time.monotonic())
        if len(requested_at) == 1:
            end_after(grace_s)
            if is_first:
                _write_notice(number, grace_s)
        elif requested_at[-1] - requested_at[0] > REPEAT_S:
            end_after(1.0)  # for cleaning up
            raise SystemExit(STOPPED)

    try:
        with handling(request_stop):
            yield lambda: bool(requested_at) or parent_has_died()
    finally:
        for timer in timers:
            timer.cancel()


def _write_notice(number: int, grace_s: float) -> None:
    """Without Python's buffers, which the signal may have interrupted, and even if nobody reads it."""
    text = f"megabatch: {signal.Signals(number).name}: stops with a checkpoint within {grace_s:g} s (--grace-s)"
    with contextlib.suppress(OSError):
        os.write(2, f"{text}; a second signal ends it at once\n".encode())


def _say(text: str) -> None:
    typer.echo(text)
