"""`megabatch bench allreduce`: times every configuration of the gradient exchange on this machine or job."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from megabatch.cli.completion import complete_from
from megabatch.cli.options import DEVICES, require_choice
from megabatch.comm.autotune.choose import tuning_file
from megabatch.errors import SettingsError
from megabatch.runtime import AllReduce, Wire

if TYPE_CHECKING:
    from megabatch.comm.autotune.choose import Measured
    from megabatch.comm.launch import World

ALGORITHMS = tuple(name for name in get_args(AllReduce) if name != "auto")
WIRES = get_args(Wire)


@dataclass(frozen=True)
class _Plan:
    """The measurements to make."""

    sizes: list[float]
    algorithms: list[str]
    wires: list[str]
    buckets: list[float]
    shape: tuple[int, int] | None
    repeats: int
    table: Path | None


def bench_allreduce(
    workers: Annotated[
        int, typer.Option(help="Local workers; under torchrun, torchrun's workers are used.", min=2)
    ] = 2,
    sizes: Annotated[str, typer.Option("--mib", help="MiB of fp32 gradients, comma-separated.")] = "1,10,100",
    algorithms: Annotated[
        str, typer.Option(help="Comma-separated.", autocompletion=complete_from(ALGORITHMS))
    ] = ",".join(ALGORITHMS),
    wires: Annotated[
        str, typer.Option(help="Comma-separated: fp32, fp16, bf16.", autocompletion=complete_from(WIRES))
    ] = "fp32",
    buckets: Annotated[str, typer.Option("--bucket-mib", help="MiB per bucket, comma-separated.")] = "25",
    shape: Annotated[
        str | None, typer.Option(help="Ranks per row x ranks per column, for example 4x2; default: hosts are rows.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Repeats of each measurement.", min=1)] = 5,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure all wires and two bucket sizes; save for --all-reduce auto.")
    ] = False,
    table: Annotated[
        Path | None, typer.Option(help="File for --tune; default allreduce.json in ~/.cache/megabatch.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or mps.", autocompletion=complete_from(DEVICES))
    ] = "auto",
    timeout_s: Annotated[float, typer.Option(help="Seconds after which a collective times out.", min=1)] = 300.0,
) -> None:
    """Times the gradient exchange. Each algorithm, bucket size and wire is timed; the slowest worker counts."""
    from megabatch.comm.launch import join
    from megabatch.comm.launcher_environment import started_by_launcher
    from megabatch.comm.local_workers import run_local_workers

    plan = _Plan(
        sizes=[_number("--mib", text) for text in sizes.split(",")],
        algorithms=[require_choice("--algorithms", name, ALGORITHMS) for name in algorithms.split(",")],
        wires=list(WIRES) if tune else [require_choice("--wires", name, WIRES) for name in wires.split(",")],
        buckets=[4.0, 25.0] if tune and buckets == "25" else [_number("--bucket-mib", t) for t in buckets.split(",")],
        shape=parse_shape(shape),
        repeats=repeats,
        table=(table or tuning_file()).expanduser() if tune else None,
    )
    if not started_by_launcher():
        if code := run_local_workers(workers, sys.argv[1:]):
            raise typer.Exit(code)
        return
    with join(device=require_choice("--device", device, DEVICES), timeout_s=timeout_s) as world:
        _measure(world, plan)


def parse_shape(text: str | None) -> tuple[int, int] | None:
    """Returns ranks per row and ranks per column: (4, 2) for "4x2". Raises SettingsError for any other form."""
    if text is None:
        return None
    x, times, y = text.partition("x")
    if not times or not x.isdecimal() or not y.isdecimal():
        raise SettingsError(f"--shape {text}: needed ROWxCOLUMN in ranks, for example --shape 4x2")
    return int(x), int(y)


def _number(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 2**20:
        raise SettingsError(
            f"{option} {text}: needed positive numbers of MiB, separated by commas; for example {option} 1,25"
        )
    return value


def _measure(world: "World", plan: _Plan) -> None:
    """Runs one worker's part of the measurements; rank 0 prints the results and writes the table."""
    from megabatch.comm.autotune.measure import Bench, cells_to_measure
    from megabatch.comm.exchange.grid import choose_rows

    hosts = _hosts(world)
    rows, why = choose_rows(world.world_size, shape=plan.shape, hosts=hosts)
    grid = (len(rows[0]), len(rows))
    _print(world, f"{world.world_size} workers as {grid[0]} x {grid[1]} ({why})")
    bench, measured = Bench(hosts, world.device), []
    for size in plan.sizes:
        buckets = [mib for mib in sorted(plan.buckets) if mib < size] or [
            min(plan.buckets)
        ]  # a larger bucket holds everything
        cells = cells_to_measure(grid, algorithms=plan.algorithms, buckets_mib=buckets, wires=plan.wires)
        found = bench.measure(cells, round(size * 2**20), repeats=plan.repeats)
        measured += found
        _print(world, _lines(found))
    bench.close()
    if plan.table is not None and world.is_first:
        _save(plan.table, hosts, measured, world)


def _save(table: Path, hosts: Sequence[str], measured: "Sequence[Measured]", world: "World") -> None:
    import torch
    import torch.distributed as dist

    from megabatch.comm.autotune.choose import describe_world, write_table

    name = describe_world(dist.get_backend(), hosts)
    write_table(table, name, measured, torch=torch.__version__)
    _print(world, f"saved {len(measured)} measurements ({name}) to {table}, which --all-reduce auto reads")


def _hosts(world: "World") -> list[str]:
    from megabatch.comm.launch import all_gather_objects
    from megabatch.comm.peers import host_name

    return all_gather_objects(host_name(), world)


def _lines(measured: "Sequence[Measured]") -> str:
    """Formats the cells of one size, fastest first, each with the flat fp32 exchange's median over its own."""
    flat = next((row.median_s for row in measured if row.cell.algorithm == "flat" and row.cell.wire == "fp32"), None)
    lines = [f"{measured[0].num_bytes / 2**20:g} MiB: median ms (quartiles), times faster than flat fp32"]
    for row in sorted(measured, key=lambda row: row.median_s):
        cell = row.cell
        ratio = f"{flat / row.median_s:5.2f} x" if flat else ""
        lines.append(
            f"  {cell.algorithm:12} {cell.shape[0]:>3} x {cell.shape[1]:<3} {cell.wire} bucket {cell.bucket_mib:<5g}"
            f" {1e3 * row.median_s:9.2f} ({1e3 * row.q1_s:.2f} .. {1e3 * row.q3_s:.2f}) {ratio}"
        )
    return "\n".join(lines)


def _print(world: "World", text: str) -> None:
    if world.is_first:
        typer.echo(text)
