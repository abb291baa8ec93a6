"""The laboratory's lines as markdown: times, ratios, bytes and time against the model, and what `auto` would pick."""

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from megabatch.comm.cost import Link, Network, cost

ALGORITHMS = ("flat", "hierarchical", "torus", "split_torus")
ON_THE_WIRE = 8948 / 9018  # payload of a frame of 9000 bytes: IPv4, TCP with timestamps, Ethernet header
BUSY = 0.9  # a cell that keeps the processors this busy measures them, not the network
Line = dict[str, Any]


def report(lines: Sequence[Line]) -> str:
    """Every cell, then the claims: bytes, model, where each wins, the choice."""
    groups: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for line in lines:
        groups[key_of(line)].append(line)
    rows = [_row(key, groups[key]) for key in sorted(groups)]
    return "\n".join([*_HEADER, *rows, "", *_claims(groups)])


def key_of(line: Line) -> tuple[Any, ...]:
    """What cells are compared within."""
    return tuple(line[name] for name in ("hosts", "ranks_per_host", "order", "rate_mbit", "delay_ms", "num_bytes"))


def median_s(line: Line) -> float:
    """Median of the repeats."""
    return statistics.median(line["seconds"])


def predicted_s(line: Line) -> float:
    """By the alpha-beta model, with the constants calibrated for this rate and delay."""
    num_chunks = max(1, -(-line["num_bytes"] // int(line["cell"]["bucket_mib"] * 2**20)))
    return cost(line["cell"]["algorithm"], line["num_bytes"], _shape(line), _network(line)).seconds(num_chunks)


def formula_bytes(line: Line) -> float:
    """Bytes that leave a host, by the formula."""
    if _shape(line)[0] == 1:  # one column of all ranks: every rank of a host sends its own
        n, x = line["hosts"] * line["ranks_per_host"], line["ranks_per_host"]
        return float(2 * line["num_bytes"] * x * (n - x) / n)
    return cost(line["cell"]["algorithm"], line["num_bytes"], _shape(line), _network(line)).bytes_leaving_host


def _network(line: Line) -> Network:
    bytes_per_s = line["rate_mbit"] * 125e3 * ON_THE_WIRE
    edges = 1 if line["order"] == "block" else line["ranks_per_host"]
    delay_s = 1e-3 * line["delay_ms"]
    column = Link(delay_s, bytes_per_s, max(line["column_step_s"] - delay_s, 0.0))  # a step is latency and overhead
    return Network(Link(0.0, line["row_bytes_per_s"], line["row_step_s"]), column, ring_edges_out=edges)


def _shape(line: Line) -> tuple[int, int]:
    x, y = line["cell"]["shape"]
    return x, y


def _best(lines: Iterable[Line], algorithm: str) -> Line | None:
    return min((line for line in lines if line["cell"]["algorithm"] == algorithm), key=median_s, default=None)


_HEADER = (
    "| hosts x ranks | order | Mbit/s | ms | bytes | flat ms | hierarchical | torus | split torus "
    "| flat / best of ours | model | bytes left a host / formula | best time / model | busy |",
    "|" + "---|" * 14,
)


def _row(key: tuple[Any, ...], lines: Sequence[Line]) -> str:
    hosts, ranks, order, rate, delay, size = key
    best = {name: _best(lines, name) for name in ALGORITHMS}
    flat, ours = best["flat"], min((line for n, line in best.items() if line and n != "flat"), key=median_s)
    assert flat is not None
    modelled = predicted_s(flat) / min(predicted_s(line) for n, line in best.items() if line and n != "flat")
    counted = statistics.median(ours["host_bytes"]) / formula_bytes(ours)
    busy = max(statistics.median(line["busy"]) for line in lines)
    times = " | ".join(f"{1e3 * median_s(line):.2f}{_ways(line)}" if line else "" for line in best.values())
    return (
        f"| {hosts} x {ranks} | {order} | {rate:g} | {delay:g} | {size:,} | {times} "
        f"| {median_s(flat) / median_s(ours):.2f} ({ours['cell']['algorithm']}) | {modelled:.2f} "
        f"| {counted:.3f} | {median_s(ours) / predicted_s(ours):.2f} | {busy:.0%} |"
    )


def _ways(line: Line) -> str:
    shape = "" if _shape(line)[0] > 1 or line["ranks_per_host"] == 1 else " (1 column)"
    return f"{shape}{' (4 MiB)' if line['cell']['bucket_mib'] == 4 else ''}"


def _claims(groups: dict[tuple[Any, ...], list[Line]]) -> list[str]:
    lines = [line for group in groups.values() for line in group]
    large = [line for line in lines if line["num_bytes"] >= 1_000_000]
    errors = sorted(abs(statistics.median(line["host_bytes"]) / formula_bytes(line) - 1) for line in large)
    ratios = sorted(median_s(line) / predicted_s(line) for line in lines)
    free = sorted(median_s(line) / predicted_s(line) for line in lines if statistics.median(line["busy"]) < BUSY)
    picks = [pick for group in groups.values() if (pick := _pick(group)) is not None]
    return [
        f"- cells: {len(lines)} in {len(groups)} conditions",
        f"- bytes against the formula, 1 MB and more: median error {_percent(errors)}, worst {max(errors):.2%}, "
        f"within 2 %: {_share(error <= 0.02 for error in errors)}",
        f"- time / model: median {statistics.median(ratios):.2f}, within 1.3: {_share(r <= 1.3 for r in ratios)}; "
        f"where processors were less than {BUSY:.0%} busy: {_describe(free)}",
        f"- auto, choosing by every other repeat, judged by the rest: within 5 % of the best "
        f"{_share(pick <= 1.05 for pick in picks)}, worst {max(picks, default=1.0):.2f} x",
    ]


def _pick(lines: Sequence[Line]) -> float | None:
    """Time of the cell that is best by the even repeats, over the best time, both by the odd repeats."""
    if min(len(line["seconds"]) for line in lines) < 4:
        return None
    chosen = min(lines, key=lambda line: statistics.median(line["seconds"][::2]))
    judged = [statistics.median(line["seconds"][1::2]) for line in lines]
    return statistics.median(chosen["seconds"][1::2]) / min(judged)


def _describe(ratios: Sequence[float]) -> str:
    if not ratios:
        return "none"
    return f"median {statistics.median(ratios):.2f}, within 1.3: {_share(r <= 1.3 for r in ratios)}"


def _percent(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2%}" if values else "none"


def _share(flags: Iterable[bool]) -> str:
    kept = list(flags)
    return f"{sum(kept)} of {len(kept)}"


def load(text: str) -> list[Line]:
    """The lines of a measurement file."""
    return [json.loads(line) for line in text.splitlines()]
