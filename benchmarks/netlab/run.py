"""Measure the gradient exchange in the laboratory and record every repeat.

    sudo python benchmarks/netlab/run.py measure --hosts 4 --ranks 2 --order block --output FILE.jsonl
    sudo python benchmarks/netlab/run.py launch --hosts 4 --ranks 2 --rate-mbit 1000 -- megabatch train fashion_mnist
    sudo python benchmarks/netlab/run.py clean
    python benchmarks/netlab/run.py report FILE.jsonl... > table.md

`measure` writes one line per rate, delay, size and configuration of the exchange: times, bytes that left each host,
load of the processors, and the constants of the alpha-beta model as calibrated for that rate and delay. If the
laboratory is not available, for example without root, it prints the reason and exits with 0.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lab import CONGESTION_CONTROL, LabUnavailable, NetworkLab, remove_leftovers
from report import report
from worker import serve

from megabatch.comm.autotune.choose import Cell

SIZES = (4096, 1_000_000, 10_000_000, 100_000_000)
REPEATS = {4096: 15, 1_000_000: 7, 10_000_000: 3, 100_000_000: 1}
ALGORITHMS = ("flat", "hierarchical", "torus", "split_torus")


def main() -> None:
    """Entry point of the command line."""
    arguments = _parser().parse_args()
    try:
        sys.exit(arguments.run(arguments))
    except LabUnavailable as missing:
        print(f"skipped: {missing}")


def measure(options: argparse.Namespace) -> int:
    """Measures all rates, delays and sizes for one layout of ranks."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    delays = [float(text) for text in options.delays.split(",")]
    rates = [float(text) for text in options.rates.split(",")]
    sizes = [int(text) for text in options.sizes.split(",")]
    for delayed in sorted({delay > 0 for delay in delays}):
        with _lab(options, rates[0], delayed) as lab, _ranks(lab, options) as control:
            for rate in rates:
                for delay in (delay for delay in delays if (delay > 0) == delayed):
                    lab.shape(rate, delay)
                    _measure_links(lab, control, options, sizes)
    return 0


def launch(options: argparse.Namespace) -> int:
    """Runs a command on every rank of every host, with torchrun's environment."""
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    with NetworkLab(options.hosts, rate_mbit=options.rate_mbit, delay_ms=options.delay_ms) as lab:
        codes = lab.run_everywhere(
            command, ranks_per_host=options.ranks, order=options.order, timeout_s=options.timeout_s,
            output=options.output,
        )  # fmt: skip
    return max(map(abs, codes))


def clean(_options: argparse.Namespace) -> int:
    """Removes the namespaces of killed runs."""
    print("removed", *remove_leftovers())
    return 0


def write_report(options: argparse.Namespace) -> int:
    """Prints the tables of measurement files as markdown."""
    lines = [json.loads(line) for path in options.files for line in path.read_text().splitlines()]
    print(report(lines))
    return 0


def cells_for(num_bytes: int, shape: tuple[int, int]) -> list[Cell]:
    """Returns all algorithms in 25 MiB buckets, and above 4 MiB all but the split torus in 4 MiB buckets too.

    Up to 4 MiB, where latency counts, the torus on a single column of all ranks is added instead.
    """
    cells = [Cell(algorithm, shape, 25.0, "fp32") for algorithm in ALGORITHMS]
    if num_bytes > 4 * 2**20:
        cells += [Cell(algorithm, shape, 4.0, "fp32") for algorithm in ALGORITHMS[:3]]
    else:
        cells.append(Cell("torus", (1, shape[0] * shape[1]), 25.0, "fp32"))
    return cells


def _measure_links(lab: NetworkLab, control: Connection, options: argparse.Namespace, sizes: Sequence[int]) -> None:
    shape = (options.ranks, options.hosts)
    constants = _ask(control, task="calibrate", shape=shape)
    for num_bytes in sizes:
        repeats = max(1, round(REPEATS.get(num_bytes, 3) * options.effort))
        started = time.perf_counter()
        rows = _ask(
            control, task="measure", cells=cells_for(num_bytes, shape), num_bytes=num_bytes, repeats=repeats,
            warmup=1 if num_bytes < 10_000_000 else 0,
        )  # fmt: skip
        facts = {
            "hosts": options.hosts, "ranks_per_host": options.ranks, "order": options.order,
            "rate_mbit": lab.rate_mbit, "delay_ms": lab.delay_ms, "num_bytes": num_bytes, **constants,
            "torch": torch.__version__, "kernel": platform.release(), "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0], "realtime": options.realtime, "congestion_control": CONGESTION_CONTROL,
        }  # fmt: skip
        with options.output.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(facts | row) + "\n" for row in rows)
        seconds = time.perf_counter() - started
        print(
            f"{options.hosts} hosts x {options.ranks} {options.order} {lab.rate_mbit:g} Mbit/s {lab.delay_ms:g} ms "
            f"{num_bytes:>11,} bytes: {seconds:.1f} s",
            flush=True,
        )


def _lab(options: argparse.Namespace, rate_mbit: float, delayed: bool) -> NetworkLab:
    return NetworkLab(options.hosts, rate_mbit=rate_mbit, delayed=delayed, realtime=options.realtime)


@contextmanager
def _ranks(lab: NetworkLab, options: argparse.Namespace) -> Iterator[Connection]:
    """Forks the ranks, so that torch is imported only once; yields the connection to rank 0."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    places = lab.places(options.ranks, options.order)
    names = [host.name for host, _ in places]
    children = []
    try:
        for rank, (host, local_rank) in enumerate(places):
            variables = lab.environment(rank, local_rank, host, options.ranks)
            child = context.Process(target=serve, args=(host, variables, names, theirs, options.realtime), daemon=True)
            child.start()
            children.append(child)
        _receive(ours, 120.0)
        yield ours
        ours.send(None)
    finally:
        for child in children:
            child.join(2.0)
            child.kill()
        for child in children:
            child.join(10.0)


def _ask(control: Connection, **request: Any) -> Any:
    control.send(request)
    return _receive(control, 900.0)


def _receive(control: Connection, timeout_s: float) -> Any:
    if not control.poll(timeout_s):
        raise TimeoutError(f"the ranks did not answer within {timeout_s:g} s")
    return control.recv()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    layout = argparse.ArgumentParser(add_help=False)
    layout.add_argument("--hosts", type=int, default=4)
    layout.add_argument("--ranks", type=int, default=2, help="ranks per host")
    layout.add_argument("--order", choices=("block", "round_robin"), default="block")
    verb = verbs.add_parser("measure", parents=[layout])
    verb.add_argument("--rates", default="200,1000", help="Mbit/s")
    verb.add_argument("--delays", default="0,0.5,2", help="ms, one way")
    verb.add_argument("--sizes", default=",".join(map(str, SIZES)), help="bytes of fp32 gradients")
    verb.add_argument("--effort", type=float, default=1.0, help="multiplies the number of repeats")
    verb.add_argument("--realtime", action="store_true", help="give the ranks priority over other programs")
    verb.add_argument("--output", type=Path, required=True)
    verb.set_defaults(run=measure)
    verb = verbs.add_parser("launch", parents=[layout])
    verb.add_argument("--rate-mbit", type=float, default=1000.0)
    verb.add_argument("--delay-ms", type=float, default=0.0)
    verb.add_argument("--timeout-s", type=float, default=600.0)
    verb.add_argument("--output", type=Path, help="folder for the other ranks' output")
    verb.add_argument("command", nargs=argparse.REMAINDER)
    verb.set_defaults(run=launch)
    verbs.add_parser("clean").set_defaults(run=clean)
    verb = verbs.add_parser("report")
    verb.add_argument("files", type=Path, nargs="+")
    verb.set_defaults(run=write_report)
    return parser


if __name__ == "__main__":
    main()
