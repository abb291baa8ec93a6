"""Runs jobs as processes with time limits, beside one another on CPU cores or alone on the GPU. Imports no torch.

A job appends JSON lines to NAME.jsonl. It writes NAME.ready once it has prepared what needs no GPU for itself, and
begins to measure when NAME.go exists. The next job prepares while one measures.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Result = dict[str, Any]
POLL_S = 0.05


class TimeOver(Exception):  # noqa: N818  # the usual end of a lease, not an error
    """The limit of the call has passed, or the process was told to end."""


@dataclass(frozen=True)
class Job:
    """One process.

    limit_s is the time without a new line of results after which it is killed. `beside` jobs that follow one another
    run at once; one that also `waits` warms up there and is measured alone, after all of them. `needs` names Python
    modules or programs. `always`: runs in call two even where ours is too slow for the rest of it.
    """

    name: str
    words: tuple[str, ...]
    limit_s: float
    beside: bool = False
    waits: bool = False
    needs: tuple[str, ...] = ()
    always: bool = False


class Running:
    """A started job. Its process group holds whatever the process itself starts."""

    def __init__(self, job: Job, command: Sequence[str], folder: Path) -> None:
        self.job = job
        self.lines, self._go, self._ready, self._log = (
            folder / f"{job.name}.{ending}" for ending in ("jsonl", "go", "ready", "log")
        )
        self._go.unlink(missing_ok=True)
        self._ready.unlink(missing_ok=True)
        self._size, self._first_cases = self._num_bytes(), self._begun()
        self._since_s, self.may_measure = time.monotonic(), False
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def go(self) -> None:
        """Lets the job measure."""
        self._since_s, self.may_measure = time.monotonic(), True
        self._go.touch()

    def is_ready(self) -> bool:
        """True once the job has prepared."""
        return self._ready.exists()

    def has_ended(self) -> bool:
        """True if the process is gone; it is not reaped, so that its id still names its group."""
        if self.process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def hangs(self) -> bool:
        """True if there has been no new line for the job's limit."""
        if self._num_bytes() != self._size:
            self._size, self._since_s = self._num_bytes(), time.monotonic()
        return time.monotonic() - self._since_s > self.job.limit_s

    def has_progressed(self) -> bool:
        """True if it began a case that no earlier process of the job had begun."""
        return self._begun() != self._first_cases

    def kill(self) -> None:
        """Ends the process and all of its group."""
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def failure(self, reason: str) -> Result:
        """The case under way with the reason and the last line that the process printed."""
        printed = self._log.read_text(errors="replace").strip().splitlines()
        *_, case = ("whole job", *self._begun())
        return {"case": case, "error": ": ".join([reason, *printed[-1:]])[:400]}

    def _begun(self) -> dict[str, None]:
        """Cases that were begun, in their order."""
        return dict.fromkeys(result["case"] for result in read_lines(self.lines) if result.get("begun"))

    def _num_bytes(self) -> int:
        return self.lines.stat().st_size if self.lines.exists() else 0


@dataclass
class Schedule:
    """Runs jobs in order until `limit_s` have passed; nothing that it started is left running."""

    folder: Path
    command: Callable[[Job], Sequence[str]]
    limit_s: float
    _started: dict[str, Running] = field(default_factory=dict)
    _done: set[str] = field(default_factory=set)
    _start_s: float = field(default_factory=time.monotonic)

    def run(self, jobs: Sequence[Job]) -> None:
        """Runs all jobs; what could not run, or failed, becomes a line of its results."""
        previous = [signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            for beside, group in itertools.groupby(jobs, key=lambda job: job.beside):
                self._run_group(list(group), beside=beside)
        except TimeOver as over:
            for job in jobs:
                running = self._started.get(job.name)
                if running is not None and running.may_measure:
                    self._add(job, running.failure(str(over)))
                elif job.name not in self._done:
                    self._add(job, {"case": "whole job", "skipped": str(over)})
        finally:
            for running in self._started.values():
                running.kill()
            for number, handler in zip((signal.SIGTERM, signal.SIGINT), previous, strict=True):
                signal.signal(number, handler)

    def _run_group(self, jobs: list[Job], *, beside: bool) -> None:
        if beside:
            self._together(jobs)
            jobs = [job for job in jobs if job.waits]
        for job, following in itertools.zip_longest(jobs, jobs[1:]):
            self._alone(job, following)

    def _together(self, jobs: list[Job]) -> None:
        """Runs jobs at once until all have ended, or are ready to be measured alone."""
        for job in jobs:
            self._start(job)
            if not job.waits:
                self._started[job.name].go()
        left = list(jobs)
        while left:
            self._pause()
            for job in list(left):
                running = self._started[job.name]
                is_warm = job.waits and running.is_ready() and not running.has_ended()
                if is_warm or self._is_over(running):
                    left.remove(job)

    def _alone(self, job: Job, following: Job | None) -> None:
        """Measures one job while the next one prepares; one that dies runs again behind the case that it died in."""
        again = True
        while again:
            if job.name not in self._started:
                if job.waits:
                    return  # it failed beside the others, which is in its results
                self._start(job)
            running = self._started[job.name]
            running.go()
            if following is not None and following.name not in self._started and not following.waits:
                self._start(following)
            while not (ended := self._is_over(running)):
                self._pause()
            again = ended == "failed" and running.has_progressed() and not job.waits

    def _is_over(self, running: Running) -> str:
        """Returns "done" or "failed" for a process that has ended or hangs, which is then gone, and "" otherwise."""
        reason = ""
        if running.has_ended():
            running.kill()  # also what it started and left behind
            code = running.process.returncode
            reason = f"the process ended with code {code}" if code else "done"
        elif running.hangs():
            reason = f"no result for {running.job.limit_s:.0f} s"
            running.kill()
        if not reason:
            return ""
        del self._started[running.job.name]
        self._done.add(running.job.name)
        if reason == "done":
            return reason
        self._add(running.job, running.failure(reason))
        return "failed"

    def _start(self, job: Job) -> None:
        print(f"[{time.monotonic() - self._start_s:4.0f} s] {job.name}", file=sys.stderr, flush=True)
        self._started[job.name] = Running(job, self.command(job), self.folder)

    def _pause(self) -> None:
        if time.monotonic() - self._start_s > self.limit_s:
            raise TimeOver("the time was over")
        time.sleep(POLL_S)

    def _add(self, job: Job, result: Result) -> None:
        with (self.folder / f"{job.name}.jsonl").open("a") as file:
            file.write(json.dumps({"job": job.name, **result}) + "\n")


def read_lines(path: Path) -> list[Result]:
    """Results in a file; a line that is not a JSON object becomes an error."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [_parsed(line, path.stem) for line in lines]


def _parsed(line: str, job: str) -> Result:
    try:
        result = json.loads(line)
        if isinstance(result, dict) and "case" in result:
            return {"job": job, **result}
    except ValueError:
        pass
    return {"job": job, "case": "its lines", "error": f"no result: {line[:80]!r}"}


def _end(*_: object) -> None:
    raise TimeOver("the process was told to end")
