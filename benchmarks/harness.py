"""Timing that can be compared: interleaved in one run, as medians with quartiles, one JSON line per measurement."""

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
    """Seconds of each repeat, in the order they were run."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median of the repeats."""
        return statistics.median(self.seconds)

    @property
    def min_s(self) -> float:
        """The fastest repeat: what the work costs when nothing else runs, if there was such a moment."""
        return min(self.seconds)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """First and third quartile; both the only value where there is one repeat."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


def measure(work: Work, warmup: int = 3, repeats: int = 20, *, queued: int = 0) -> Timing:
    """Times `work` alone. To compare two works use `compare`: a shared machine is never twice the same."""
    return compare({"work": work}, warmup=warmup, repeats=repeats, queued=queued)["work"]


def compare(
    works: Mapping[str, Work], *, warmup: int = 3, repeats: int = 20, seed: int = 0, queued: int = 0
) -> dict[str, Timing]:
    """Times all works in one run, interleaved: in every round each runs once, in an order drawn anew.

    So that a slow moment of the machine meets all of them, and none always runs in the same other's leftover cache.
    On a GPU a repeat lasts from an idle device to an idle device again. With `queued` it is the mean of that many runs
    behind another one that is not timed: the launch of a CUDA graph on an idle device takes 8 to 15 us.
    """
    for _ in range(warmup):
        for work in works.values():
            work()
    generator = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        order = list(works)
        generator.shuffle(order)
        for name in order:
            seconds[name].append(_seconds_of(works[name], queued))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(timing: Timing, baseline: Timing) -> dict[str, float]:
    """How many times longer than `baseline`: of the medians, of the minima, and quartiles of the rounds' own ratios."""
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
    """Writes one JSON line per record, making the folder."""
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
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if queued:
        work()
    begin.record()
    for _ in range(max(1, queued)):
        work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / max(1, queued) / 1e3


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
