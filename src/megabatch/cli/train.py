"""`megabatch train RECIPE`: starts its own local workers, or joins those that torchrun started."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from megabatch import recipes
from megabatch.cli.options import (
    CACHE_HELP,
    SET_HELP,
    device_here,
    parse_data,
    parse_loss_scale,
    parse_settings,
    parse_workers,
    require_choice,
)
from megabatch.errors import SettingsError
from megabatch.recipe import Recipe, from_json, override
from megabatch.runtime import AllReduce, Decode, Fusion, Precision, Runtime, Switch, Wire
from megabatch.train.recipe_warnings import too_few_updates_for_running_averages

if TYPE_CHECKING:
    from megabatch.data.loading.train_loader import TrainLoader


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe; `megabatch recipes` lists them.")],
    data: Annotated[
        str | None, typer.Option(help="Folder with train/ and val/, or URL of shards, instead of the recipe's data.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Run folder; default runs/RECIPE-TIME.")] = None,
    workers: Annotated[
        str, typer.Option(help="Local workers, or auto: one for each GPU, else one for each core, at most 8.")
    ] = "auto",
    settings: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)] = None,
    steps: Annotated[
        int | None, typer.Option(help="Updates of the weights after which to evaluate, save and end.", min=1)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --output, by the same recipe.")
    ] = False,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(help="Samples of one forward and backward on one worker; default what suits it.", min=1),
    ] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    loss_scale: Annotated[str, typer.Option(help="Of fp16 gradients: dynamic, or a power of two.")] = "dynamic",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    compile_model: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile: minutes at the start.")
    ] = False,
    capture: Annotated[str, typer.Option(help="Whole steps in a CUDA graph: auto, on or off.")] = "auto",
    fusion: Annotated[
        str, typer.Option(help="auto: fused kernels where there are any; plain: one operation at a time.")
    ] = "auto",
    weight_copies: Annotated[bool, typer.Option(help="In 16 bit, cast weights as they are updated.")] = True,
    cudnn_benchmark: Annotated[
        bool,
        typer.Option(help="On a GPU, measure cuDNN's algorithms first; without it a resumed run rounds as before."),
    ] = True,
    keep_memory: Annotated[bool, typer.Option(help="On a CPU, keep freed memory for the next step.")] = True,
    all_reduce: Annotated[str, typer.Option(help="auto, flat, hierarchical, torus or split_torus.")] = "auto",
    wire: Annotated[str, typer.Option(help="Gradients on the wire: fp32, fp16 or bf16.")] = "fp32",
    channels_last: Annotated[bool, typer.Option(help="Memory layout of images and weights: NHWC, or NCHW.")] = True,
    cache: Annotated[Path | None, typer.Option(help=CACHE_HELP)] = None,
    remote_cache_gib: Annotated[
        float, typer.Option(help="GiB of disk for copies of remote shards, of all workers of a machine.", min=0)
    ] = 64.0,
    decode: Annotated[str, typer.Option(help="What decodes JPEGs: auto, cpu or gpu.")] = "auto",
    decoded_cache_gib: Annotated[
        float, typer.Option(help="GiB of each GPU's memory for images that it has decoded.", min=0)
    ] = 0.0,
    max_bad_share: Annotated[
        float | None, typer.Option(help="Share of unreadable images that stops a run; default 0.01.", min=0, max=1)
    ] = None,
    checkpoint_every_steps: Annotated[
        int, typer.Option(help="Updates between checkpoints, besides those at evaluations; 0 for none.", min=0)
    ] = 0,
    keep_checkpoints: Annotated[int, typer.Option(help="Newest checkpoints kept, besides the best.", min=1)] = 2,
    timeout_s: Annotated[float, typer.Option(help="Seconds that a worker waits for another.", min=1)] = 300.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only warnings and the last line.")] = False,
) -> None:
    """Trains a recipe. The last line holds the top-1 accuracy and where the report is."""
    chosen = override(recipes.get(recipe), parse_settings(settings or []))
    runtime = Runtime(
        workers=parse_workers(workers),
        micro_batch_size=micro_batch_size,
        device=require_choice("--device", device, ("auto", "cpu", "cuda")),
        precision=cast(Precision, require_choice("--precision", precision, get_args(Precision))),
        loss_scale=parse_loss_scale(loss_scale),
        compile=compile_model,
        capture=cast(Switch, require_choice("--capture", capture, get_args(Switch))),
        fusion=cast(Fusion, require_choice("--fusion", fusion, get_args(Fusion))),
        weight_copies=weight_copies,
        cudnn_benchmark=cudnn_benchmark,
        keep_memory=keep_memory,
        all_reduce=cast(AllReduce, require_choice("--all-reduce", all_reduce, get_args(AllReduce))),
        wire=cast(Wire, require_choice("--wire", wire, get_args(Wire))),
        channels_last=channels_last,
        data=parse_data(data),
        cache=cache,
        remote_cache_gib=remote_cache_gib,
        decode=cast(Decode, require_choice("--decode", decode, get_args(Decode))),
        decoded_cache_gib=decoded_cache_gib,
        max_bad_share=max_bad_share,
        checkpoint_every_steps=checkpoint_every_steps,
        keep_checkpoints=keep_checkpoints,
        timeout_s=timeout_s,
        resume=resume,
    )
    _train(chosen, runtime, output, max_steps=steps, quiet=quiet)


def _train(recipe: Recipe, runtime: Runtime, output: Path | None, *, max_steps: int | None, quiet: bool) -> None:
    from megabatch.comm import launch

    if launch.started_by_launcher():
        _work(recipe, runtime, output, max_steps=max_steps, quiet=quiet)
        return
    folder = _run_folder(recipe, runtime, output)
    num_workers = _check_before_start(recipe, runtime, folder)
    if num_workers == 1:
        _work(recipe, runtime, folder, max_steps=max_steps, quiet=quiet)
        return
    arguments = [*_without_option(sys.argv[1:], "--output"), "--output", str(folder)]
    code = launch.run_local_workers(num_workers, arguments)
    if code:
        raise typer.Exit(code)


def _check_before_start(recipe: Recipe, runtime: Runtime, folder: Path) -> int:
    """The number of local workers; whatever the user got wrong is said here, before anything is written."""
    from megabatch.app.data import check_room, fit_to_data, open_data
    from megabatch.app.resolve import check, default_workers
    from megabatch.comm.launch import World

    device = device_here(runtime.device)
    with contextlib.closing(open_data(recipe, runtime, on_progress=_say, probe=True)) as data:
        fitted = fit_to_data(recipe, data)
        num_workers = runtime.workers or default_workers(fitted, runtime)
        check_room(fitted, runtime, data, world=World(world_size=num_workers, local_world_size=num_workers))
    check(fitted, runtime, world_size=num_workers, device=device)
    if runtime.resume:
        _check_resumed(fitted, folder)
    return num_workers


def _check_resumed(recipe: Recipe, folder: Path) -> None:
    """CheckpointError if the run to go on with is another recipe's."""
    from megabatch.app.state import refuse_other_recipe
    from megabatch.train.checkpoint import list_checkpoints

    for newest in list_checkpoints(folder / "checkpoints")[-1:]:
        refuse_other_recipe(recipe, from_json(newest.recipe))


def _work(recipe: Recipe, runtime: Runtime, output: Path | None, *, max_steps: int | None, quiet: bool) -> None:
    """One worker's whole life."""
    import torch

    from megabatch.app.data import check_room, fit_to_data, open_data
    from megabatch.app.run import open_run
    from megabatch.comm.launch import broadcast_from_rank0, join, sum_over_workers
    from megabatch.train.loop import train as run_loop

    with (
        join(device=runtime.device, timeout_s=runtime.timeout_s, threads=runtime.threads_per_worker) as world,
        contextlib.closing(open_data(recipe, runtime)) as data,
    ):
        folder = broadcast_from_rank0(output or _run_folder(recipe, runtime, None), world)
        fitted = fit_to_data(recipe, data)
        check_room(fitted, runtime, data, world=world)
        started = time.perf_counter()
        with (
            _stop_on_signal() as stop_requested,
            open_run(
                fitted,
                runtime,
                data,
                world=world,
                folder=folder,
                stop_requested=stop_requested,
                max_steps=max_steps,
                quiet=quiet,
            ) as run,
        ):
            if warning := too_few_updates_for_running_averages(fitted):
                run.log({"event": "warning", "text": warning})
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
            _finish(folder, top1, images_per_s, seconds, run.state.step, complete=complete, quiet=quiet)
        if evaluation is None and not complete:
            raise typer.Exit(1)


def _finish(
    folder: Path, top1: float | None, images_per_s: float, seconds: float, step: int, *, complete: bool, quiet: bool
) -> None:
    """Writes the report and says how the run ended; without an accuracy it was stopped, or had nothing left to do."""
    from megabatch.observe.report import write_report

    report = write_report([folder], folder / "report.html")
    if top1 is None and complete:
        _say(f"trained to the end before, at step {step:,}; `megabatch evaluate {folder}` counts its accuracy again")
        return
    if top1 is None:
        _say(f"stopped at step {step:,}; the same command with --output {folder} --resume goes on")
        return
    if not quiet:
        _say(f"trained {seconds:.1f} s, evaluations included; run folder {folder}, report {report}")
    _say(f"top1 {top1:.4f}  {images_per_s:,.0f} images/s  report {report}")


def _run_folder(recipe: Recipe, runtime: Runtime, output: Path | None) -> Path:
    if output is None:
        if runtime.resume:
            raise SettingsError("--resume needs the run folder to go on from; --output runs/NAME names it")
        return Path("runs") / f"{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}"
    if output.exists() and not output.is_dir():
        raise SettingsError(f"--output {output} is a file; a folder that is new or empty works")
    holds_run = (output / "events.jsonl").exists()
    if holds_run and not runtime.resume:
        raise SettingsError(f"{output} holds a run already; --resume goes on with it, another --output starts anew")
    if runtime.resume and not holds_run:
        raise SettingsError(f"{output} holds no run to resume; without --resume a new one starts there")
    return output


def _without_option(arguments: list[str], option: str) -> list[str]:
    """`arguments` less `option VALUE` and `option=VALUE`."""
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
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Within the block SIGINT and SIGTERM ask for a stop at the next step; a SIGINT 2 s later ends at once."""
    asked_at: list[float] = []

    def ask(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and asked_at and time.monotonic() - asked_at[0] > 2:
            raise KeyboardInterrupt
        asked_at.append(time.monotonic())

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked_at)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    typer.echo(text)
