"""Speed of a whole training step on a CPU, compared with plain scripts around the same networks.

    python benchmarks/step.py --output benchmarks/out [--model NAME ...] [--case NAME ...] [--repeats 9]

ResNet-50 at 224 px with 32 images, ResNet-18 at 32 px (3x3 stem) with 128 and ResNet-8, the demo's net, at 28 px with
512: forward, cross entropy with label smoothing, backward, SGD with momentum. `plain` cases are our own network with
torch's operations, equal to torchvision's; torchvision's and timm's models run too where these packages can be
imported. On a processor without bfloat16 instructions the float32 cases are the ones to compare with. Every contender
is its own process (`step_cases.py`); all are warm before the first round, run in an order drawn anew each round, and
sleep in between.
"""

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megabatch.bench.timing import Timing, record, table, write_lines
from step_cases import SETTINGS, cases, missing

BASELINE = "plain eager fp32"
HERE = Path(__file__).resolve().parent


class Contender:
    """A process that runs one step per request."""

    def __init__(self, case: str, model: str) -> None:
        command = [sys.executable, str(HERE / "step_cases.py"), case, model, str(SETTINGS[model]["batch"])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        spin = {"GOMP_SPINCOUNT": "3000"} if case.startswith("megabatch") else {}  # as the command line sets it
        self.process = subprocess.Popen(command, text=True, cwd=HERE, env=os.environ | spin, **pipes)
        self.answer = self._line().split()

    def step(self) -> float:
        """Runs one step; returns its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self._line())

    def end(self) -> float:
        """Ends the process; returns its peak memory in MiB."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        peak = float(self._line())
        self.process.wait()
        return peak

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)} ended without an answer")  # type: ignore[arg-type]
        return line


def race(model: str, names: Sequence[str], *, repeats: int) -> tuple[dict[str, Timing], dict[str, dict[str, float]]]:
    """Returns the seconds of every step, and parameters, threads and peak memory, by contender that can run."""
    contenders = {}
    for name in names:
        print(f"warming up: {name}", file=sys.stderr, flush=True)
        try:
            contenders[name] = Contender(name, model)
        except RuntimeError as error:  # torch.compile may fail
            print(f"left out: {error}", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    generator = random.Random(0)
    for _ in range(repeats):
        for name in generator.sample(list(contenders), len(contenders)):
            seconds[name].append(contenders[name].step())
    facts = {}
    for name, contender in contenders.items():
        _, parameters, threads = contender.answer
        facts[name] = {"parameters": float(parameters), "threads": float(threads), "peak_mib": contender.end()}
    return {name: Timing(tuple(values)) for name, values in seconds.items()}, facts


def main() -> None:
    """Times the chosen models, prints tables, writes one JSON line per contender."""
    options = _options()
    for model in options.model or SETTINGS:
        if options.batch:
            SETTINGS[model]["batch"] = options.batch
        names = _runnable([*dict.fromkeys([*(options.case or cases(model)), BASELINE])], model)
        timings, facts = race(model, names, repeats=options.repeats)
        images = SETTINGS[model]["batch"]
        records = [
            record(
                "step",
                name,
                timing,
                parameters={"model": model, **SETTINGS[model], "images_per_s": images / timing.median_s, **facts[name]},
                baseline=(BASELINE, timings[BASELINE]),
                packages=("timm", "torchvision"),
            )
            for name, timing in sorted(timings.items(), key=lambda item: item[1].median_s)
        ]
        write_lines(options.output / f"step_{model}.jsonl", records)
        print(f"{model}, {images} images of {SETTINGS[model]['pixels']} px", flush=True)
        print(table(records), flush=True)
        for values in records:
            about = values["parameters"]
            print(
                f"{values['case']:<40} {about['images_per_s']:7.2f} images/s, {1 / values['ratio']:5.2f} x as fast as "
                f"{BASELINE}, peak {about['peak_mib']:,.0f} MiB"
            )


def _runnable(names: Sequence[str], model: str) -> list[str]:
    """`names` without those whose package cannot be imported; prints the reason for each of these."""
    reasons = {name: missing(name, model) for name in names}
    for name, reason in reasons.items():
        if reason:
            print(f"skipped: {name} ({reason})", file=sys.stderr, flush=True)
    return [name for name in names if not reasons[name]]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the JSON lines")
    parser.add_argument("--model", action="append", choices=tuple(SETTINGS), help="may be given several times")
    parser.add_argument("--case", action="append", choices=tuple(cases("resnet50")), help="may be given several times")
    parser.add_argument("--repeats", type=int, default=9, help="steps of each contender")
    parser.add_argument(
        "--batch", type=int, help="images per step; default 32 (resnet50), 128 (resnet18), 512 (resnet8)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
