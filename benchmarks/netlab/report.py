"""The laboratory's measurements as markdown: times, ratios, bytes and times over the model's, and the choices."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megabatch.comm.autotune.cost import Link, Network, cost

ALGORITHMS = ("flat", "hierarchical", "torus", "split_torus")
ON_THE_WIRE = 8948 / 9018  # payload of a frame of 9000 bytes: IPv4, TCP with timestamps, Ethernet header
AHEAD = 1.05  # smaller predicted gains are within the spread of the repeats
BUSY = 0.9  # above this load a cell measures the processors, not the network
Line = dict[str, Any]


def report(lines: Sequence[Line]) -> str:
    """Returns a table of all conditions, then the claims: bytes, model, gains, quality of the choices."""
    groups: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for line in with_overhead(lines):
        groups[key_of(line)].append(line)
    rows = [_row(key, groups[key]) for key in sorted(groups)]
    return "\n".join([*_HEADER, *rows, "", *_claims(groups)])


def with_overhead(lines: Sequence[Line]) -> list[Line]:
    """Adds the software's share of a step between hosts: the median step time of the layout without delay."""
    kept: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for line in lines:
        if line["delay_ms"] == 0:
            kept[_layout(line)].append(line["column_step_s"])
    overhead = {layout: statistics.median(steps) for layout, steps in kept.items()}
    return [{**line, "column_overhead_s": overhead.get(_layout(line), line["row_step_s"])} for line in lines]


def _layout(line: Line) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("hosts", "ranks_per_host", "order"))


def key_of(line: Line) -> tuple[Any, ...]:
    """Returns the condition of a line; cells are compared within a condition."""
    return tuple(line[name] for name in ("hosts", "ranks_per_host", "order", "rate_mbit", "delay_ms", "num_bytes"))


def median_s(line: Line) -> float:
    """Median of the repeats."""
    return statistics.median(line["seconds"])


def predicted_s(line: Line) -> float:
    """Seconds by the alpha-beta model, with the constants calibrated for this layout, rate and delay."""
    num_chunks = max(1, -(-line["num_bytes"] // int(line["cell"]["bucket_mib"] * 2**20)))
    return cost(line["cell"]["algorithm"], line["num_bytes"], _shape(line), _network(line)).seconds(num_chunks)


def formula_bytes(line: Line) -> float:
    """Bytes that leave a host, by the model."""
    if _shape(line)[0] == 1:  # one column of all ranks: every rank of a host sends its own
        n, x = line["hosts"] * line["ranks_per_host"], line["ranks_per_host"]
        return float(2 * line["num_bytes"] * x * (n - x) / n)
    return cost(line["cell"]["algorithm"], line["num_bytes"], _shape(line), _network(line)).bytes_leaving_host


def _network(line: Line) -> Network:
    bytes_per_s = line["rate_mbit"] * 125e3 * ON_THE_WIRE
    n, x = line["hosts"] * line["ranks_per_host"], line["ranks_per_host"]
    if _shape(line)[0] == 1 and x > 1:  # one column of all ranks: a host's x ranks share its link
        bytes_per_s *= (n - 1) / (x * (n - x))
    edges = 1 if line["order"] == "block" else line["ranks_per_host"]
    overhead_s = line["column_overhead_s"]
    column = Link(max(line["column_step_s"] - overhead_s, 0.0), bytes_per_s, overhead_s)
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
    ours = min((line for name, line in best.items() if line and name != "flat"), key=median_s)
    counted = statistics.median(ours["host_bytes"]) / formula_bytes(ours)
    busy = max(statistics.median(line["busy"]) for line in lines)
    times = " | ".join(f"{1e3 * median_s(line):.2f}{_options(line)}" if line else "" for line in best.values())
    return (
        f"| {hosts} x {ranks} | {order} | {rate:g} | {delay:g} | {size:,} | {times} "
        f"| {_gain(lines):.2f} ({ours['cell']['algorithm']}) | {_predicted_gain(lines):.2f} "
        f"| {counted:.3f} | {median_s(ours) / predicted_s(ours):.2f} | {busy:.0%} |"
    )


def _options(line: Line) -> str:
    shape = "" if _shape(line)[0] > 1 or line["ranks_per_host"] == 1 else " (1 column)"
    return f"{shape}{' (4 MiB)' if line['cell']['bucket_mib'] == 4 else ''}"


def _claims(groups: dict[tuple[Any, ...], list[Line]]) -> list[str]:
    lines = [line for group in groups.values() for line in group]
    large = [line for line in lines if line["num_bytes"] >= 1_000_000]
    errors = sorted(abs(statistics.median(line["host_bytes"]) / formula_bytes(line) - 1) for line in large)
    ratios = sorted(median_s(line) / predicted_s(line) for line in lines)
    free = sorted(median_s(line) / predicted_s(line) for line in lines if statistics.median(line["busy"]) < BUSY)
    picks = [pick for group in groups.values() if (pick := _pick(group)) is not None]
    modelled = [_model_pick(group) for group in groups.values()]
    ahead = {key: _gain(group) for key, group in groups.items()}
    predicted = {key: gain for key, gain in ahead.items() if _predicted_gain(groups[key]) >= AHEAD}
    dealt = [gain for (_, _, order, *_), gain in ahead.items() if order == "round_robin"]
    late = [gain for (hosts, *_, size), gain in ahead.items() if hosts == 8 and size == 4096]
    return [
        f"- cells: {len(lines)} in {len(groups)} conditions",
        f"- bytes against the formula, 1 MB and more: median error {_percent(errors)}, "
        f"worst {max(errors, default=0.0):.2%}, within 2 %: {_share(error <= 0.02 for error in errors)}",
        f"- time / model: median {statistics.median(ratios):.2f}, within 1.3: {_share(r <= 1.3 for r in ratios)}; "
        f"where the ranks kept the processors less than {BUSY:.0%} busy: {_describe(free)}",
        f"- best of ours ahead of flat where the model promises {AHEAD:g} x or more: "
        f"{_share(gain > 1 for gain in predicted.values())}; not in {_names(predicted, lambda gain: gain <= 1)}",
        f"- round-robin order: {_range(dealt)}; at least 2 x: {_share(gain >= 2 for gain in dealt)}",
        f"- 4 KB at 8 hosts: {_range(late)}; at least 2 x: {_share(gain >= 2 for gain in late)}",
        f"- auto, choosing by every other repeat, judged by the rest: within 5 % of the best "
        f"{_share(pick <= 1.05 for pick in picks)}, worst {max(picks, default=1.0):.2f} x",
        f"- the model's choice, unmeasured: within 5 % of the best {_share(p <= 1.05 for p in modelled)}, "
        f"within 1.3: {_share(p <= 1.3 for p in modelled)}, worst {max(modelled):.2f} x",
    ]


def _gain(lines: Sequence[Line]) -> float:
    """Best flat time over best time of ours."""
    flat = min(median_s(line) for line in lines if line["cell"]["algorithm"] == "flat")
    return flat / min(median_s(line) for line in lines if line["cell"]["algorithm"] != "flat")


def _predicted_gain(lines: Sequence[Line]) -> float:
    """The gain that the model predicts."""
    flat = min(predicted_s(line) for line in lines if line["cell"]["algorithm"] == "flat")
    return flat / min(predicted_s(line) for line in lines if line["cell"]["algorithm"] != "flat")


def _model_pick(lines: Sequence[Line]) -> float:
    """Measured time of the cell with the smallest prediction, over the best measured time."""
    return median_s(min(lines, key=predicted_s)) / min(map(median_s, lines))


def _names(gains: dict[tuple[Any, ...], float], wanted: Callable[[float], bool]) -> str:
    named = [
        f"{hosts} x {ranks} {order} {rate:g} Mbit/s {delay:g} ms {size:,} B ({gains[key]:.2f})"
        for key in gains
        if wanted(gains[key])
        for hosts, ranks, order, rate, delay, size in [key]
    ]
    return "; ".join(named) or "none"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f} x, median {statistics.median(values):.2f}" if values else "none"


def _pick(lines: Sequence[Line]) -> float | None:
    """Chooses a cell by the even repeats; returns its time over the best time, both by the odd repeats."""
    if min(len(line["seconds"]) for line in lines) < 3:
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
