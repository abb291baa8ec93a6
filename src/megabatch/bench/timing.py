"""Timing for comparisons: interleaved in one run, median and quartiles, one JSON line per measurement."""

import importlib.metadata
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megabatch.observe.environment import describe

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat, in the order of the runs."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median of the repeats."""
        return statistics.median(self.seconds)

    @property
    def min_s(self) -> float:
        """Shortest repeat, the one least disturbed by other work."""
        return min(self.seconds)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """First and third quartile; of one repeat both are its value."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


def measure(work: Work, warmup: int = 3, repeats: int = 20, *, queued: int = 0) -> Timing:
    """Times `work` alone; `compare` times several, which on a shared machine is the only fair comparison."""
    return compare({"work": work}, warmup=warmup, repeats=repeats, queued=queued)["work"]


def compare(
    works: Mapping[str, Work],
    *,
    warmup: int = 3,
    repeats: int = 20,
    seconds: float = 0.0,
    seed: int = 0,
    queued: int = 0,
) -> dict[str, Timing]:
    """Times all works interleaved: each runs once per round, in a random order.

    So a disturbance of the machine affects all of them, and none always finds the same other's data in the caches.
    There are at least `repeats` rounds, and more until `seconds` have passed. On a GPU a repeat lasts from an idle
    device to an idle device. With `queued` it is the mean of that many runs behind one that is not timed: the launch of
    a CUDA graph on an idle device takes 8 to 15 us.
    """
    for _ in range(warmup):
        for work in works.values():
            work()
    generator = random.Random(seed)
    found: dict[str, list[float]] = {name: [] for name in works}
    end_s, num_rounds = time.perf_counter() + seconds, 0
    while works and (num_rounds < repeats or time.perf_counter() < end_s):
        order = list(works)
        generator.shuffle(order)
        for name in order:
            found[name].append(_seconds_of(works[name], queued))
        num_rounds += 1
    return {name: Timing(tuple(values)) for name, values in found.items()}


def ratio(timing: Timing, baseline: Timing) -> dict[str, float]:
    """Time divided by the baseline's: of the medians, of the minima, and quartiles of the ratios within a round."""
    rounds = Timing(tuple(a / b for a, b in zip(timing.seconds, baseline.seconds, strict=True)))
    first, third = rounds.quartiles_s
    return {
        "ratio": timing.median_s / baseline.median_s,
        "ratio_of_minima": timing.min_s / baseline.min_s,
        "ratio_quartile1": first,
        "ratio_quartile3": third,
    }


def record(
    benchmark: str,
    case: str,
    timing: Timing,
    *,
    parameters: Mapping[str, Any],
    baseline: tuple[str, Timing] | None = None,
    packages: Sequence[str] = (),
) -> dict[str, Any]:
    """One measurement as JSON values, with versions, commit and hardware."""
    first, third = timing.quartiles_s
    values: dict[str, Any] = {
        "benchmark": benchmark,
        "case": case,
        "median_s": timing.median_s,
        "min_s": timing.min_s,
        "quartile1_s": first,
        "quartile3_s": third,
        "num_repeats": len(timing.seconds),
        "parameters": dict(parameters),
    }
    if baseline is not None:
        values |= {"baseline": baseline[0], **ratio(timing, baseline[1])}
    versions = {package: _version(package) for package in packages}
    load = {"load_average_1min": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}
    threads = torch.get_num_threads()
    return values | {"environment": {**describe(), **versions, "torch_threads": threads, **load}}


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON line per record; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(values) + "\n" for values in records))


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records as lines of text: median, quartiles, minimum, ratios of medians and of minima to the baseline."""
    width = max(len(values["case"]) for values in records)
    lines = []
    for values in records:
        spread = f"{1e3 * values['quartile1_s']:8.2f} .. {1e3 * values['quartile3_s']:7.2f}"
        line = f"{values['case']:<{width}}  median {1e3 * values['median_s']:8.2f} ms  ({spread})"
        line += f"  min {1e3 * values['min_s']:8.2f}"
        if "ratio" in values:
            line += f"  {values['ratio']:5.2f} x {values['baseline']} ({values['ratio_of_minima']:.2f} x its min)"
        lines.append(line)
    return "\n".join(lines)


def _seconds_of(work: Work, queued: int) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    begin, end = events
    if queued:
        work()
    begin.record()
    for _ in range(max(1, queued)):
        work()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / max(1, queued) / 1e3


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
