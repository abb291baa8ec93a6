"""`megabatch data fetch|pack|check`: download a known data set, pack one into shards, find and repair bad files."""

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megabatch.cli.options import CACHE_HELP
from megabatch.files import printable, write_text

if TYPE_CHECKING:
    from megabatch.data.checking.check import CheckReport, Problem

data_app = typer.Typer(
    help="Download, pack and check data sets.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_MAX_LISTED = 200
_DATA_SET = (
    "Data set: a folder of class folders, of tars or of parquet files; one file; or FILE.py:FUNCTION, which is run."
)


@data_app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="fashion_mnist or cifar10.")],
    cache: Annotated[Path | None, typer.Option(help=CACHE_HELP)] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder with the published files; tried first.")] = None,
) -> None:
    """Downloads a known data set. Uses the first source that provides it, verifies checksums, prints the path."""
    from megabatch.data.fetching.fetch import fetch as fetch_data

    fetched = fetch_data(name, cache=cache, folder=folder, on_progress=lambda line: typer.echo(line, err=True))
    typer.echo(f"{fetched.path} (from {fetched.source})")


@data_app.command()
def pack(
    src: Annotated[Path, typer.Argument(help=_DATA_SET)],
    dst: Annotated[Path, typer.Argument(help="Folder for the shards; an interrupted run is resumed.")],
    shard_mib: Annotated[float, typer.Option(help="Size of a shard in MiB.", min=0.001)] = 256,
    max_side: Annotated[int | None, typer.Option(help="Reduce longer sides to this many pixels.", min=1)] = None,
    quality: Annotated[
        int | None, typer.Option(help="Re-encode all images as JPEGs of this quality.", min=1, max=100)
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Skip images that cannot be decoded.")] = False,
    workers: Annotated[int | None, typer.Option(help="Number of threads; default one per core.", min=1)] = None,
) -> None:
    """Packs images into indexed tar shards. Any WebDataset reader can read them; by default files are not changed."""
    from megabatch.data.packing.pack import pack as pack_data

    with _progress("packing") as on_progress:
        report = pack_data(
            src,
            dst,
            shard_bytes=int(shard_mib * (1 << 20)),
            max_side=max_side,
            quality=quality,
            skip_bad=skip_bad,
            workers=workers,
            on_progress=on_progress,
        )
    for name, reason in report.skipped:
        typer.echo(printable(f"skipped {name}: {reason}"))
    counts = ", ".join(f"{count:,} {part}" for part, count in report.num_samples.items())
    kept = f", {report.num_kept_shards} of them kept from an earlier run" if report.num_kept_shards else ""
    typer.echo(f"{counts} images of {len(report.class_names)} classes in {report.num_shards} shards{kept}")
    typer.echo(f"{report.num_bytes / (1 << 20):,.1f} MiB, {report.num_reencoded:,} re-encoded; {report.folder}")


@data_app.command()
def check(
    path: Annotated[Path, typer.Argument(help=_DATA_SET)],
    repair: Annotated[
        bool, typer.Option("--repair", help="Rewrite repairable files; keep each original as NAME.orig.")
    ] = False,
    exclude: Annotated[bool, typer.Option("--exclude", help="Move bad files to PATH.excluded.")] = False,
    into: Annotated[Path | None, typer.Option(help="Write repaired and excluded files to this folder instead.")] = None,
    upright: Annotated[
        bool,
        typer.Option("--upright", help="Turn photos by their EXIF rotation, which training ignores; keep NAME.orig."),
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Treat odd files as bad.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all problems to this file, as JSON.")] = None,
    workers: Annotated[int | None, typer.Option(help="Number of threads; default one per core.", min=1)] = None,
) -> None:
    """Finds bad and odd images by decoding every one. The exit code is 1 if bad ones remain, else 0."""
    from megabatch.data.checking.check import check as check_data

    with _progress("checking") as on_progress:
        report = check_data(path, workers=workers, on_progress=on_progress)
    _list(report)
    if json_file is not None:
        write_text(json_file, _as_json(report))
    remaining = _change(report, repair=repair, upright=upright, exclude=exclude, into=into)
    _advise(path, remaining)
    if any(strict or problem.is_bad for problem in remaining):
        raise typer.Exit(1)


def _change(report: "CheckReport", *, repair: bool, upright: bool, exclude: bool, into: Path | None) -> "list[Problem]":
    """Applies the requested changes, prints each, and returns the remaining problems."""
    from dataclasses import replace

    from megabatch.data.checking import repair as repairs

    kinds = (repairs.DEFAULT_REPAIRS if repair else frozenset()) | ({"rotated"} if upright else set())
    rewrite = partial(repairs.repair, kinds=kinds)
    for requested, change, verb in ((kinds, rewrite, "repaired"), (exclude, repairs.exclude, "moved")):
        if not requested:
            continue
        changed = change(report, into=into)
        for problem, path in changed.done:
            typer.echo(f"{verb} {printable(problem.name)} ({problem.kind}): now {printable(str(path))}")
        report = replace(report, problems=changed.remaining)
    return report.problems


def _advise(path: Path, remaining: "list[Problem]") -> None:
    """Prints the command that deals with bad and with rotated files in a folder, if some remain."""
    kinds = {problem.kind for problem in remaining if problem.kind == "rotated" or problem.is_bad}
    if not path.is_dir() or not kinds:
        return
    command = f"megabatch data check {shlex.quote(str(path))}"
    if kinds - {"rotated"}:
        typer.echo(f"`{command} --exclude` moves bad files to another folder; `--repair` first rewrites what it can")
    if "rotated" in kinds:
        typer.echo(f"training ignores the rotation of photos; `{command} --upright` turns them")


def _list(report: "CheckReport") -> None:
    for problem in report.problems[:_MAX_LISTED]:
        mark = "bad" if problem.is_bad else "odd"
        typer.echo(f"{mark}  {problem.kind:18} {printable(problem.name)}: {printable(problem.detail)}")
    if len(report.problems) > _MAX_LISTED:
        typer.echo(f"... and {len(report.problems) - _MAX_LISTED:,} more; --json FILE writes all of them")
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report.count().items()))
    odd = len(report.problems) - len(report.bad)
    typer.echo(f"{report.num_images:,} images, {len(report.bad)} bad, {odd} odd" + (f": {kinds}" if kinds else ""))


def _as_json(report: "CheckReport") -> str:
    problems = [
        {"name": problem.name, "kind": problem.kind, "bad": problem.is_bad, "detail": problem.detail}
        for problem in report.problems
    ]
    return json.dumps({"images": report.num_images, "problems": problems}, indent=1) + "\n"


@contextlib.contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yields a callback for a progress bar on stderr; None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
