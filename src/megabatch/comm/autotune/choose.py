"""`--all-reduce auto`: choice of algorithm, grid shape and bucket size, from measurements or by a rule.

`megabatch bench allreduce --tune` writes a table of measurements; the fastest cell of the table for this world is used.
A world that was not measured gets

    flat    on NCCL, whose own all-reduce is aware of the topology
    torus   on gloo, if there are several hosts whose numbers of ranks have a common divisor above 1 (it is the length
            of the grid's rows), or if the wire is 16-bit, as gloo's all-reduce adds 16-bit values slowly
    flat    on gloo, else

Evidence: benchmarks/records/2026-11-20_2cores_netlab. In its 122 conditions (4 x 2, 4 x 4 and 8 x 2 ranks) the torus is
within 1.3 x of the fastest cell in 110 (with 4 MiB buckets in 113), the hierarchical algorithm in 102, flat in 37. On
one host of 4 ranks the torus takes 1.06 x the time of flat on fp32, 0.69 x on bf16 and 0.48 x on fp16.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megabatch.errors import SettingsError
from megabatch.files import cache_folder, read_json, write_text

FORMAT = 1
TIE = 0.05  # relative difference of medians below which two cells count as equally fast


def tuning_file() -> Path:
    """Default path of the tables that `megabatch bench allreduce --tune` writes."""
    return cache_folder() / "allreduce.json"


@dataclass(frozen=True)
class Cell:
    """One configuration of the gradient exchange."""

    algorithm: str
    shape: tuple[int, int]  # ranks per row, ranks per column
    bucket_mib: float
    wire: str


@dataclass(frozen=True)
class Measured:
    """Median and quartiles, in seconds, of `repeats` exchanges of `num_bytes` of fp32 gradients in one cell."""

    cell: Cell
    num_bytes: int
    median_s: float
    q1_s: float
    q3_s: float
    repeats: int


@dataclass(frozen=True)
class Choice:
    """A cell and the reason for it."""

    cell: Cell
    why: str
    bucket_plan: str = "size"

    def __str__(self) -> str:
        """For the log, for example "all-reduce torus 2 x 2, bucket 25 MiB, wire fp32 (as given)"."""
        cell = self.cell
        grid = "" if cell.algorithm == "flat" else f" {cell.shape[0]} x {cell.shape[1]}"  # flat ignores the grid
        buckets = "buckets in cubic groups" if self.bucket_plan == "cubic" else f"bucket {cell.bucket_mib:g} MiB"
        return f"all-reduce {cell.algorithm}{grid}, {buckets}, wire {cell.wire} ({self.why})"


def describe_world(backend: str, hosts: Sequence[str]) -> str:
    """Name of a world in the file, for example "gloo, ranks per host 4+4"; a table holds for worlds of its name."""
    counts = sorted(Counter(hosts).values(), reverse=True)
    return f"{backend}, ranks per host {'+'.join(map(str, counts))}"


def write_table(path: Path, world: str, rows: Sequence[Measured], **facts: str) -> None:
    """Writes `rows` as the table of `world`, and keeps the file's tables of other worlds.

    `facts`, for example torch's version, are stored with the table. Raises SettingsError if the existing file is not
    a table.
    """
    tables = _read(path) if path.exists() else {}
    tables[world] = {"rows": [asdict(row) for row in rows], **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"format": FORMAT, "tables": tables}, indent=1))


def read_table(path: Path, world: str) -> list[Measured]:
    """Returns the rows of the table of `world`; empty without a file or without such a table in it.

    Raises SettingsError if the file was not written by `write_table`.
    """
    if not path.exists():
        return []
    try:
        rows = _read(path).get(world, {"rows": []})["rows"]
        return [_measured(row) for row in rows]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SettingsError(f"{path} is not a table of measurements ({error}); delete it and tune again") from error


def choose(
    *,
    num_bytes: int,
    hosts: Sequence[str],
    backend: str,
    shape: tuple[int, int],
    wires: Sequence[str] = ("fp32",),
    bucket_mib: float = 25.0,
    path: Path | None = None,
) -> Choice:
    """Returns the exchange to use for `num_bytes` of fp32 gradients: the fastest measured cell with one of `wires`.

    Of the sizes in the table, the one nearest to `num_bytes` (by ratio) decides. Without a table for this world the
    rule of the module's docstring decides, with the grid `shape`, `wires[0]` and `bucket_mib`. All ranks must use the
    choice of one rank, since the files of two hosts may differ.

    Raises SettingsError if the file at `path` is not a table.
    """
    world = describe_world(backend, hosts)
    rows = [row for row in (read_table(path, world) if path else []) if row.cell.wire in wires]
    if not rows:
        algorithm = default_algorithm(backend, hosts, wires[0])
        why = f"default for {world}, as `megabatch bench allreduce --tune` has not measured it"
        return Choice(Cell(algorithm, shape, bucket_mib, wires[0]), why)
    # Sizes are compared by ratio, as the time goes from latency to bandwidth over orders of magnitude.
    nearest = min({row.num_bytes for row in rows}, key=lambda size: abs(math.log(size / max(num_bytes, 1))))
    fit = [row for row in rows if row.num_bytes == nearest]
    fastest = min(row.median_s for row in fit)
    best = min((row for row in fit if row.median_s <= (1 + TIE) * fastest), key=_backend_first)
    return Choice(best.cell, f"fastest of {len(fit)} cells measured at {nearest / 2**20:.3g} MiB on {world}")


def default_algorithm(backend: str, hosts: Sequence[str], wire: str) -> str:
    """Returns the algorithm for a world that was not measured, by the rule of the module's docstring."""
    if backend == "nccl":
        return "flat"
    ranks_per_host = Counter(hosts).values()
    rows_are_hosts = len(ranks_per_host) > 1 and math.gcd(*ranks_per_host) > 1
    return "torus" if rows_are_hosts or wire != "fp32" else "flat"


def _backend_first(row: Measured) -> tuple[bool, float]:
    """Sort key among cells within `TIE` of the fastest: the backend's own algorithm first, then by time."""
    return row.cell.algorithm != "flat", row.median_s


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise SettingsError(f"{path} has format {content['format']}, needed {FORMAT}; delete it and tune again")
        return dict(content["tables"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} is not a table of measurements ({error}); delete it and tune again") from error


def _measured(row: dict[str, Any]) -> Measured:
    cell = row["cell"]
    x, y = cell["shape"]
    made = Cell(cell["algorithm"], (int(x), int(y)), float(cell["bucket_mib"]), cell["wire"])
    numbers = {name: row[name] for name in ("num_bytes", "median_s", "q1_s", "q3_s", "repeats")}
    if not all(isinstance(value, int | float) and value > 0 for value in numbers.values()):
        raise ValueError(f"a row holds {numbers}")
    return Measured(made, **numbers)
