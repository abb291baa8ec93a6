"""Injects faults into real multi-process runs and checks that each run ends as an unharmed one.

    python tests/faults/fault_runs.py --faults 100 --output benchmarks/out/faults        # `make faults`

A run is `megabatch train` with local workers under a minimal job scheduler, which starts the command again with
`--resume` until it exits with 0. Each fault is a signal to a random worker or to the launcher, at a random moment after
training has begun or begun again. Checked at the end of a run: weights and optimizer state equal those of the unharmed
run bit for bit, each position of the sample stream was trained on once, and no process is left.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megabatch.comm.worker_watch import ORPHAN_GRACE_S
from megabatch.observe.environment import describe
from megabatch.observe.events import read_events
from megabatch.observe.run_folder import holds_run, load_runs
from megabatch.train.checkpoint import newest_intact

MARK = "MEGABATCH_FAULT_RUN"
"""Environment variable that all processes of a run inherit: those that outlive it are found by its value."""
KINDS = {
    "kill worker": ("worker", signal.SIGKILL),
    "freeze worker": ("worker", signal.SIGSTOP),
    "terminate worker": ("worker", signal.SIGTERM),
    "kill launcher": ("launcher", signal.SIGKILL),
    "terminate launcher": ("launcher", signal.SIGTERM),
}
DEMO = ["fashion_mnist", "--precision", "fp32", "--checkpoint-every", "20steps", "--peer-timeout-s", "5"]
HANG_S = 300.0
"""Seconds after which a run that has not recovered counts as hanging."""


@dataclass(frozen=True)
class Fault:
    """A signal of `KINDS`, `delay_s` after training has begun; `rank` counts for workers only."""

    kind: str
    rank: int
    delay_s: float


@dataclass(frozen=True)
class Recovery:
    """Outcome of one fault: seconds until the first step after a restart, and exit codes of the command until then."""

    fault: Fault
    at_step: int
    to_training_s: float
    exit_codes: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """Comparison of a finished run with the unharmed one; all counts should be 0, and `differing` empty."""

    num_lost_samples: int
    num_repeated_samples: int
    num_orphans: int
    differing: tuple[str, ...]


def draw_faults(seed: int, count: int, *, num_workers: int, kinds: Sequence[str] = tuple(KINDS)) -> list[Fault]:
    """Faults of each kind in turn, at ranks and delays drawn from `seed`."""
    draw = random.Random(seed)
    return [Fault(kinds[n % len(kinds)], draw.randrange(num_workers), draw.uniform(0.0, 2.0)) for n in range(count)]


class Job:
    """`megabatch train` in `folder`, started again until it succeeds; all its processes end with the `with` block."""

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        launcher: Sequence[str] = (),
        output: Path | None = None,
        prefix: Sequence[str] = (),
        enter: Callable[[], None] | None = None,
        **environment: str,
    ) -> None:
        """Starts the command.

        Args:
            folder: run folder, as this process sees it.
            arguments: of `megabatch train`.
            launcher: words before `-m megabatch train`, such as torchrun's module and options.
            output: run folder, as the command sees it; default `folder`.
            prefix: command that runs Python.
            enter: called in the new process before the command.
            environment: variables of the command.
        """
        self.folder = folder
        self.exit_codes: list[int] = []
        self._launcher = launcher
        self._command = [*prefix, sys.executable, *launcher, "-m", "megabatch", "train", *arguments]
        self._command += ["--output", str(output or folder)]
        self._mark = uuid.uuid4().hex
        self._environment = os.environ | {MARK: self._mark, "GLOO_SOCKET_IFNAME": "lo"} | environment
        self._enter = enter
        self._log = folder.with_suffix(".log").open("ab")
        self._start()

    def _start(self) -> None:
        resume = ["--resume"] if self._launcher or holds_run(self.folder) else []
        self._process = subprocess.Popen(
            [*self._command, *resume],
            env=self._environment,
            stdout=self._log,
            stderr=self._log,
            preexec_fn=self._enter,  # noqa: PLW1509 - this process has one thread
        )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self.kill()
        self._process.wait()
        self._log.close()

    def kill(self) -> None:
        """Kills all processes of this job."""
        for number in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)

    def has_succeeded(self) -> bool:
        """True after exit code 0; starts the command again after another one, except that of invalid input."""
        code = self._process.poll()
        if code in {None, 0}:
            return code == 0
        assert code != 2, f"invalid input, see {self._log.name}"
        self.exit_codes.append(code)
        self._start()
        return False

    def send(self, fault: Fault) -> None:
        """Sends the fault's signal."""
        target, number = KINDS[fault.kind]
        workers = {
            int(variables["RANK"]): found for found, variables in self.processes().items() if "RANK" in variables
        }
        os.kill(self._process.pid if target == "launcher" else workers[fault.rank], number)

    def processes(self) -> dict[int, dict[str, str]]:
        """Environment variables of each process of this job, by process id."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it has ended since the listing, or belongs to another user
                lines = path.read_bytes().decode(errors="replace").split("\0")
                variables = dict(line.split("=", 1) for line in lines if "=" in line)
                if variables.get(MARK) == self._mark:
                    found[int(path.parent.name)] = variables
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of that kind so far."""
        path = self.folder / "events.jsonl"
        return [event for event in read_events(path) if event["event"] == kind] if path.is_file() else []

    def is_training(self, since_s: float = 0.0) -> bool:
        """True if the run has started, and made a step, after the time `since_s` (of `time.time`)."""
        begun = [event["time_s"] for event in self.events("run_start") if event["time_s"] > since_s]
        return bool(begun) and any(step["time_s"] >= begun[0] for step in self.events("step"))


def wait_for(is_done: Callable[[], bool], what: str, timeout_s: float = HANG_S) -> float:
    """Waits until `is_done()` and returns the seconds that took; AssertionError after `timeout_s`."""
    started = time.monotonic()
    while not is_done():
        assert time.monotonic() - started < timeout_s, f"hang: {what} took more than {timeout_s:g} s"
        time.sleep(0.1)
    return time.monotonic() - started


def run_with_faults(
    folder: Path,
    arguments: Sequence[str],
    faults: Sequence[Fault],
    *,
    say: Callable[[str], None],
    launcher: Sequence[str] = (),
) -> tuple[list[Recovery], int]:
    """Trains in `folder`; returns a recovery per fault, fewer if the run ends before, and the number of orphans."""
    recoveries: list[Recovery] = []
    with Job(folder, arguments, launcher=launcher) as job:
        wait_for(lambda: job.has_succeeded() or job.is_training(), "the start")
        for fault in faults:
            recovery = inject(job, fault)
            if recovery is None:
                break
            recoveries.append(recovery)
            say(str(recovery))
        wait_for(job.has_succeeded, "the end", timeout_s=12 * HANG_S)
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not job.processes(), "the end of all processes", timeout_s=2 * ORPHAN_GRACE_S)
        return recoveries, len(job.processes())


def inject(job: Job, fault: Fault) -> Recovery | None:
    """Sends the fault to a run that trains, and waits until it trains again; None if the run ended before."""
    time.sleep(fault.delay_s)
    if job.has_succeeded():
        return None
    steps, num_codes, since_s = job.events("step"), len(job.exit_codes), time.time()
    job.send(fault)
    seconds = wait_for(lambda: job.has_succeeded() or job.is_training(since_s), str(fault))
    if not job.is_training(since_s):
        return None
    return Recovery(fault, int(steps[-1]["step"]), seconds, tuple(job.exit_codes[num_codes:]))


def judge(folder: Path, unharmed: Path, *, num_orphans: int = 0) -> Verdict:
    """Compares the run in `folder` with the one in `unharmed`."""
    counts = count_samples(folder)
    differing = tuple(differences(final_state(folder), final_state(unharmed)))
    return Verdict(int((counts == 0).sum()), int((counts > 1).sum()), num_orphans, differing)


def count_samples(folder: Path) -> np.ndarray[Any, Any]:
    """How often each position of the sample stream was trained on, counted over the steps that led to the weights."""
    (run,) = load_runs([folder])
    assert run.recipe is not None
    images = run.recipe.num_train_images
    counts = np.zeros(round(run.recipe.total_epochs * images), dtype=np.int64)
    for step in run.steps:
        end = round(step["epoch"] * images)
        counts[end - step["global_batch_size"] : end] += 1
    return counts


def final_state(folder: Path) -> dict[str, Any]:
    """State in the newest checkpoint."""
    found = newest_intact(folder / "checkpoints")
    assert found is not None, f"{folder} has no checkpoint"
    return found[1]


def differences(left: Any, right: Any, name: str = "state") -> Iterator[str]:
    """Names of values that are not equal, bit for bit."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        for key in left:
            yield from differences(left[key], right[key], f"{name}.{key}")
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        for number, pair in enumerate(zip(left, right, strict=True)):
            yield from differences(*pair, f"{name}.{number}")
    elif not (torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right):
        yield name


def run_campaign(
    output: Path, arguments: Sequence[str], faults: Sequence[Fault], *, say: Callable[[str], None]
) -> tuple[list[Recovery], list[Verdict]]:
    """Trains once unharmed, then under faults, in as many runs as all faults need."""
    output.mkdir(parents=True)
    unharmed = output / "unharmed"
    run_with_faults(unharmed, arguments, [], say=say)
    recoveries: list[Recovery] = []
    verdicts: list[Verdict] = []
    while len(recoveries) < len(faults):
        folder = output / f"run-{len(verdicts):03d}"
        found, num_orphans = run_with_faults(folder, arguments, faults[len(recoveries) :], say=say)
        recoveries += found
        verdicts.append(judge(folder, unharmed, num_orphans=num_orphans))
        say(f"{folder.name}: {len(recoveries)} of {len(faults)} faults, {verdicts[-1]}")
    return recoveries, verdicts


def summarize(recoveries: Sequence[Recovery], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Totals over all runs, and the median seconds from a fault to the next step, by kind of fault."""
    seconds: dict[str, list[float]] = {}
    for recovery in recoveries:
        seconds.setdefault(recovery.fault.kind, []).append(recovery.to_training_s)
    return {
        "num_recoveries": len(recoveries),
        "num_runs": len(verdicts),
        "num_lost_samples": sum(verdict.num_lost_samples for verdict in verdicts),
        "num_repeated_samples": sum(verdict.num_repeated_samples for verdict in verdicts),
        "num_orphans": sum(verdict.num_orphans for verdict in verdicts),
        "num_runs_with_differing_state": sum(bool(verdict.differing) for verdict in verdicts),
        "median_to_training_s": statistics.median(recovery.to_training_s for recovery in recoveries),
        "median_to_training_s_by_kind": {kind: statistics.median(values) for kind, values in seconds.items()},
    }


def main() -> None:
    """Runs a campaign of the demo's recipe and writes `record.json`; exit code 1 if an invariant does not hold."""
    parser = argparse.ArgumentParser(description="Inject faults into runs of a recipe and check the results.")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("arguments", nargs="*", default=DEMO, help="of `megabatch train`, after --")
    given = parser.parse_args()
    arguments = [*given.arguments, "--workers", str(given.workers)]
    faults = draw_faults(given.seed, given.faults, num_workers=given.workers)
    recoveries, verdicts = run_campaign(given.output, arguments, faults, say=_say)
    summary = summarize(recoveries, verdicts)
    record = {
        "summary": summary,
        "arguments": arguments,
        "seed": given.seed,
        "environment": describe(),
        "recoveries": [dataclasses.asdict(recovery) for recovery in recoveries],
        "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts],
    }
    (given.output / "record.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    _say(json.dumps(summary, indent=1))
    wrong = ("num_lost_samples", "num_repeated_samples", "num_orphans", "num_runs_with_differing_state")
    sys.exit(any(summary[name] for name in wrong))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
