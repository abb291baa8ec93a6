"""Hardware entries for the user's machine, from the files that `megabatch bench step` and `bench allreduce` write.

Links are fitted by least squares of relative errors: the time of an all-reduce is linear in the latency and in the
inverse bandwidth of each link, with the coefficients of the cost model (comm.autotune.cost).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megabatch.comm.autotune.choose import Measured
from megabatch.comm.autotune.cost import Link, Network, cost
from megabatch.errors import SettingsError

if TYPE_CHECKING:
    import numpy as np

SEQUENTIAL = {"torus", "hierarchical"}  # their times are sums over links; those of flat are, too, on one kind of link


@dataclass(frozen=True)
class FittedLinks:
    """Links inside and between hosts; None where the measurements do not tell. `error`: median relative error."""

    row: Link | None
    column: Link | None
    ranks_per_host: int
    error: float


def fit_links(world: str, rows: Sequence[Measured]) -> FittedLinks:
    """Returns the links that explain `rows`, the table of `world` that `megabatch bench allreduce --tune` wrote.

    Raises SettingsError if hosts differ in size, or if the rows hold too few sizes to tell latency from bandwidth.
    """
    import numpy as np

    backend, _, hosts = world.partition(", ranks per host ")
    counts = {int(count) for count in hosts.split("+")}
    if len(counts) != 1:
        raise SettingsError(f"{world}: needed hosts with equally many ranks; measure on such hosts")
    ranks_per_host, num_hosts = counts.pop(), hosts.count("+") + 1
    found = [(_coefficients(row, ranks_per_host, num_hosts, direct=backend == "gloo"), row) for row in rows]
    used = [(coefficients, row) for coefficients, row in found if coefficients]
    if len({row.num_bytes for _, row in used}) < 2:
        raise SettingsError(
            f"{world}: needed measurements of two sizes or more that fit into one bucket; "
            "`megabatch bench allreduce --tune --mib 1,4,16` makes them"
        )
    matrix = np.array([[value / row.median_s for value in coefficients] for coefficients, row in used])
    solution = _least_squares(matrix)
    error = float(np.median(np.abs(matrix @ solution - 1)))
    row_s, row_byte_s, column_s, column_byte_s = map(float, solution)
    return FittedLinks(_link(row_s, row_byte_s), _link(column_s, column_byte_s), ranks_per_host, error)


def _least_squares(matrix: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Returns the x >= 0 that brings every row of `matrix @ x` nearest to 1; terms that noise makes negative are 0."""
    import numpy as np

    solution = np.zeros(matrix.shape[1])
    asked = np.flatnonzero(matrix.any(axis=0))
    while asked.size:
        scale = np.abs(matrix[:, asked]).max(axis=0)  # latencies and times per byte differ by orders of magnitude
        found = np.linalg.lstsq(matrix[:, asked] / scale, np.ones(len(matrix)), rcond=None)[0] / scale
        if (found >= 0).all():
            solution[asked] = found
            break
        asked = asked[found >= 0]
    return solution


def step_row(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a stack's row from the JSON of `megabatch bench step --output`: its fastest variant.

    Raises SettingsError if no variant was measured.
    """
    try:
        medians = [statistics.median(it["seconds"]) for it in content["variants"] if it["seconds"]]
        images, model, recipe = int(content["images"]), str(content["model"]), str(content["recipe"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise SettingsError(f"not a file of `megabatch bench step --output FILE` ({error})") from error
    if not medians:
        raise SettingsError("the file of `megabatch bench step` has no measured variant; measure again")
    return {
        "workers": 1,
        "batch": images,
        "images_per_s": images / min(medians),
        "model": model,
        "source": f"megabatch bench step {recipe}",
    }


def as_toml(name: str, rows: Sequence[Mapping[str, Any]], links: FittedLinks | None) -> str:
    """Returns the entries of a stack, its links and a cluster `name`, for `--hardware FILE`."""
    lines: list[str] = []
    if rows:
        lines += [f'[stack."{name}"]', 'device = "generic"', 'precision = "fp32"', "rows = ["]
        lines += [f"    {{ {', '.join(f'{key} = {_value(value)}' for key, value in row.items())} }}," for row in rows]
        lines += ["]", ""]
    for kind, link in (("row", links and links.row), ("host", links and links.column)):
        if link:
            lines += [f"[link.{name}_{kind}]", f"latency_us = {1e6 * link.latency_s:.3f}"]
            lines += [f"bytes_per_s = {link.bytes_per_s:.4g}", ""]
    lines += [f"[cluster.{name}]", f'stack = "{name}"', f"devices_per_host = {links.ranks_per_host if links else 1}"]
    lines += [f'row = "{name}_row"'] if links and links.row else []
    lines += [f'host_link = "{name}_host"'] if links and links.column else []
    return "\n".join(lines) + "\n"


def _coefficients(row: Measured, ranks_per_host: int, num_hosts: int, *, direct: bool) -> list[float]:
    """Factors of row latency, s per byte in rows, column latency, s per byte in columns; empty if it is not linear.

    Only fp32 tells about links: on a CPU, casts and 16-bit sums take longer than the bytes they save.
    """
    cell = row.cell
    one_host = num_hosts == 1
    in_one_part = row.num_bytes <= cell.bucket_mib * 2**20
    on_grid = one_host or cell.shape == (ranks_per_host, num_hosts)
    linear = cell.algorithm in SEQUENTIAL or (cell.algorithm == "flat" and 1 in (ranks_per_host, num_hosts))
    if not (in_one_part and on_grid and linear and cell.wire == "fp32"):
        return []
    shape = (ranks_per_host, num_hosts) if cell.algorithm == "flat" else cell.shape
    unit = cost(cell.algorithm, row.num_bytes, shape, Network(Link(1.0, 1.0), Link(1.0, 1.0), direct=direct))
    inside, between = [unit.row_latency_s, unit.row_s], [unit.column_latency_s, unit.column_s]
    if one_host:  # both axes are inside the host
        return [inside[0] + between[0], inside[1] + between[1] / cell.shape[0], 0.0, 0.0]
    return [*inside, *between]


def _link(latency_s: float, byte_s: float) -> Link | None:
    if latency_s == byte_s == 0:
        return None
    return Link(latency_s, 1 / byte_s if byte_s else math.inf)


def _value(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
