"""`--all-reduce auto`: which algorithm, shape and bucket size, by what was measured here, else by the cost model."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megabatch.comm.autotune.cost import Link, Network, predict_s
from megabatch.errors import SettingsError
from megabatch.files import cache_folder

FORMAT = 1
ASSUMED_GLOO = Network(row=Link(2e-4, 1e9), column=Link(4e-4, 1.25e8))  # one machine's cores; 1 Gbit/s between hosts
TIE = 0.05  # medians closer than this are called equal
WIRE_SHARE = {"fp32": 1.0, "fp16": 0.5, "bf16": 0.5}


def tuning_file() -> Path:
    """Where `megabatch bench allreduce --tune` keeps its tables unless told otherwise."""
    return cache_folder() / "allreduce.json"


@dataclass(frozen=True)
class Cell:
    """One way to exchange gradients."""

    algorithm: str
    shape: tuple[int, int]  # ranks per row, ranks per column
    bucket_mib: float
    wire: str


@dataclass(frozen=True)
class Measured:
    """What one exchange of `num_bytes` of fp32 gradients took that way, over `repeats`."""

    cell: Cell
    num_bytes: int
    median_s: float
    q1_s: float
    q3_s: float
    repeats: int


@dataclass(frozen=True)
class Choice:
    """The chosen way, what it should take, and the reason."""

    cell: Cell
    expected_s: float
    why: str


def describe_world(backend: str, hosts: Sequence[str]) -> str:
    """What a table was measured on, for example "gloo, ranks per host 4+4": a table is used only where it fits."""
    counts = sorted(Counter(hosts).values(), reverse=True)
    return f"{backend}, ranks per host {'+'.join(map(str, counts))}"


def write_table(path: Path, world: str, rows: Sequence[Measured], **facts: Any) -> None:
    """StatisticsSink `rows` as the table of `world` in the file, beside the tables of other worlds."""
    tables = _read(path) if path.exists() else {}
    tables[world] = {"rows": [asdict(row) for row in rows], **facts}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"format": FORMAT, "tables": tables}, indent=1), encoding="utf-8")
    partial.replace(path)


def read_table(path: Path, world: str) -> list[Measured]:
    """The rows measured on such a world; none if there is no file or no such table in it.

    Raises SettingsError where the file is not one that `megabatch bench allreduce --tune` wrote.
    """
    if not path.exists():
        return []
    try:
        rows = _read(path).get(world, {"rows": []})["rows"]
        return [_measured(row) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise SettingsError(f"{path} is not a table of measurements ({error}); delete it, or tune again") from error


def choose(
    *,
    num_bytes: int,
    hosts: Sequence[str],
    backend: str,
    shape: tuple[int, int],
    wires: Sequence[str] = ("fp32",),
    path: Path | None = None,
) -> Choice:
    """How to exchange `num_bytes` of fp32 gradients: the fastest measured cell with one of `wires`.

    Of the sizes measured, the one nearest to `num_bytes` (by ratio) decides. Without a table for this world the cost
    model decides between gloo's ring and grids of `shape` or one column; NCCL's own all-reduce, which knows the
    links, is kept. All ranks must be given one rank's choice: files differ between hosts.
    """
    world = describe_world(backend, hosts)
    rows = [row for row in (read_table(path, world) if path else []) if row.cell.wire in wires]
    if not rows:
        return _by_model(num_bytes, len(hosts), backend, shape, wires[0], _edges_out(hosts))
    nearest = min({row.num_bytes for row in rows}, key=lambda size: abs(math.log(size / max(num_bytes, 1))))
    fit = [row for row in rows if row.num_bytes == nearest]
    fastest = min(row.median_s for row in fit)
    best = min((row for row in fit if row.median_s <= (1 + TIE) * fastest), key=_plainness)
    why = f"fastest of {len(fit)} cells measured at {nearest / 2**20:.3g} MiB on {world}"
    return Choice(best.cell, best.median_s, why)


def _plainness(row: Measured) -> tuple[bool, float]:
    """Of cells that are as good as equal, the backend's own algorithm if it is among them, else the fastest."""
    return row.cell.algorithm != "flat", row.median_s


def _by_model(
    num_bytes: int, world_size: int, backend: str, shape: tuple[int, int], wire: str, edges_out: int
) -> Choice:
    bucket_mib = 25.0
    if backend == "nccl":
        return Choice(Cell("flat", shape, bucket_mib, wire), math.nan, "not measured here: NCCL's own all-reduce")
    network = Network(ASSUMED_GLOO.row, ASSUMED_GLOO.column, ring_edges_out=edges_out)
    sent = num_bytes * WIRE_SHARE[wire]
    chunks = max(1, round(num_bytes / 2**20 / bucket_mib))
    cells = [
        Cell(algorithm, grid, bucket_mib, wire)
        for grid in dict.fromkeys((shape, (1, world_size)))
        for algorithm in ("flat", "hierarchical", "torus", "split_torus")
    ]
    seconds = {cell: predict_s(cell.algorithm, sent, cell.shape, network, chunks) for cell in cells}
    best = min(cells, key=lambda cell: seconds[cell])
    return Choice(best, seconds[best], "by the cost model; `megabatch bench allreduce --tune` measures this machine")


def _edges_out(hosts: Sequence[str]) -> int:
    """The most edges of a ring in rank order that leave one host."""
    edges = Counter(host for host, after in zip(hosts, [*hosts[1:], hosts[0]], strict=True) if host != after)
    return max(edges.values(), default=0)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise SettingsError(f"{path} has format {content['format']}, needed {FORMAT}; delete it and tune again")
        return dict(content["tables"])
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not a table of measurements ({error}); delete it, or tune again") from error


def _measured(row: dict[str, Any]) -> Measured:
    cell = row["cell"]
    x, y = cell["shape"]
    made = Cell(cell["algorithm"], (int(x), int(y)), float(cell["bucket_mib"]), cell["wire"])
    numbers = {name: row[name] for name in ("num_bytes", "median_s", "q1_s", "q3_s", "repeats")}
    if not all(isinstance(value, int | float) and value > 0 for value in numbers.values()):
        raise ValueError(f"a row holds {numbers}")
    return Measured(made, **numbers)
