"""Jobs of `gpu.py` that run other programs: the tests on a GPU, training on JPEGs, compute-sanitizer."""

import functools
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

from gpu_session import Session

ROOT = Path(__file__).parents[1]
TEST_S = 60
"""Seconds after which one test is given up."""
RATE = re.compile(r"([\d,]+) images/s")


def tests(session: Session) -> None:
    """The tests marked gpu; each failure is a result, with the first line of its message."""
    report = session.output / "tests.xml"
    report.unlink(missing_ok=True)
    workers, part = ("0", "test_kernels.py") if session.quick else ("6", "")
    words = ["-m", "gpu", "-n", workers, f"--timeout={TEST_S}", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    start_s = time.monotonic()
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "gpu" / part), *words]
    done = subprocess.run(command, cwd=ROOT, check=False)
    if not report.exists():
        raise RuntimeError(f"pytest ended with code {done.returncode} and without a report")
    read_report(session, report, time.monotonic() - start_s)


def read_report(session: Session, report: Path, seconds: float) -> None:
    """Adds the numbers of passed, failed and skipped tests, and the failures."""
    cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314  # written by pytest a moment ago
    kinds = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    failed = kinds["failure"] + kinds["error"]
    counts = {"failed": len(failed), "skipped_tests": len(kinds["skipped"])}
    passed = len(cases) - sum(map(len, kinds.values()))
    session.add("tests marked gpu", passed=passed, **counts, seconds=seconds)
    for case in failed:
        found = case.find("failure") if case.find("failure") is not None else case.find("error")
        message = "" if found is None else found.get("message", "")
        session.add(f"{case.get('classname')}::{case.get('name')}", error=message.splitlines()[0] if message else "?")


def jpeg(session: Session) -> None:
    """Training of `megabatch train` on made JPEGs, decoded by the GPU and by the cores; `product` has random images."""
    for decode in ("gpu", "cpu") if session.is_cuda else ("cpu",):
        case = f"megabatch train, JPEGs, decode {decode}"
        session.guarded(case, functools.partial(_train_on_jpegs, session, case, decode))


def _train_on_jpegs(session: Session, case: str, decode: str) -> None:
    count = 8 if session.quick else 1024
    settings = {"global_batch_size": count, "bn_span": count, "peak_lr": 1e-3, "warmup": "none", "lr_scaling": "none"}
    settings |= {"model": "resnet18", "resolution": "0:32", "eval_resolution": 32} if session.quick else {}
    words = ["train", "goyal2017_8k", "--dry-run", "3" if session.quick else "14", "--device", session.device.type]
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = subprocess.run(
        [sys.executable, "-m", "megabatch", *words, "--decode", decode],
        cwd=session.output,
        capture_output=True,
        text=True,
        check=False,
    )
    rates = RATE.findall(done.stdout[done.stdout.rfind("dry run:") :])
    if done.returncode or not rates:
        raise RuntimeError((done.stderr or done.stdout)[-400:])
    session.add(case, images_per_s=float(rates[0].replace(",", "")), batch=count)


def sanitizer(session: Session) -> None:
    """compute-sanitizer over single kernels at tiny sizes: invalid accesses, and races in shared memory."""
    for tool in ("memcheck", "racecheck"):
        for function in ("stem", "batch_norm", "gram_products"):
            case = f"{tool}, {function}"
            session.guarded(case, functools.partial(_sanitized, session, case, tool, function))


def _sanitized(session: Session, case: str, tool: str, function: str) -> None:
    name = f"sanitizer-{tool}-{function}"
    (session.output / f"{name}.go").touch()
    job = [str(Path(__file__).with_name("gpu_job.py")), "--name", name, "--output", str(session.output), "--quick"]
    words = ["--tool", tool, "--error-exitcode", "9", sys.executable, *job, "--device", "cuda"]
    command = ["compute-sanitizer", *words, f"gpu_kernels.{function}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode:
        raise RuntimeError(last)
    session.add(case, way=last)
