"""Runs tests that need Triton's interpreter in one child process, and reports each under its own name.

Triton decides when it is imported whether kernels are compiled or interpreted, for the whole process; and whatever was
tested before may have imported it. So tests that use the fixture `interpreter` are run by a second pytest with
TRITON_INTERPRET=1. With that variable set from the start they run where they are.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

REPORT = "INTERPRETED_TESTS_REPORT"
IS_CHILD = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

LONGEST_TEST_S = 170.0

Outcome = dict[str, str]
CHOSEN = pytest.StashKey[list[str]]()
CHILD = pytest.StashKey["Child"]()


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Asked for by tests that run a Triton kernel on the CPU."""
    if not HAS_TRITON:
        pytest.skip("needs Triton; pip install triton==3.6.0 works")


@pytest.hookimpl(trylast=True)  # after -k and -m have had their say
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[CHOSEN] = [item.nodeid for item in items if is_interpreted(item)]


def is_interpreted(item: pytest.Item) -> bool:
    return "interpreter" in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if IS_CHILD or not is_interpreted(pyfuncitem):
        return None
    stash = pyfuncitem.config.stash
    if CHILD not in stash:
        stash[CHILD] = Child(stash[CHOSEN], pyfuncitem.config.rootpath)
    outcome = stash[CHILD].outcome(pyfuncitem.nodeid)
    if outcome["outcome"] == "skipped":
        pytest.skip(outcome["text"])
    if outcome["outcome"] != "passed":
        pytest.fail(outcome["text"], pytrace=False)
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    if CHILD in config.stash:
        config.stash[CHILD].end()


class Child:
    """The second pytest, which runs the tests in the order in which they are asked for, and reports each at its end."""

    def __init__(self, tests: list[str], root: Path) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._report, self._output = (Path(self._folder.name) / name for name in ("report", "output"))
        self._outcomes: dict[str, Outcome] = {}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "TRITON_INTERPRET": "1", REPORT: str(self._report)}
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=output)

    def outcome(self, test: str) -> Outcome:
        """Waits for the outcome of one test."""
        deadline = time.monotonic() + LONGEST_TEST_S
        while test not in self._outcomes:
            ended = self._process.poll() is not None  # before the report is read, which may be whole by then
            self._read()
            if test in self._outcomes:
                break
            if ended:
                pytest.fail(f"the child process ended before this test:\n{self._output.read_text()}", pytrace=False)
            if time.monotonic() > deadline:
                pytest.fail(f"no outcome within {LONGEST_TEST_S:g} s", pytrace=False)
            time.sleep(0.02)
        return self._outcomes[test]

    def end(self) -> None:
        """Ends the process, should it still run."""
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def _read(self) -> None:
        text = self._report.read_text() if self._report.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):  # or it is being written
                outcome = json.loads(line)
                self._outcomes[outcome["test"]] = outcome


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if REPORT in os.environ and (report.when == "call" or not report.passed):
        outcome = {"test": report.nodeid, "outcome": report.outcome, "text": report.longreprtext}
        with Path(os.environ[REPORT]).open("a") as file:
            file.write(json.dumps(outcome) + "\n")


def let_loops_count() -> None:
    """Triton 3.6 makes loop bounds by int(array of one element), which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if IS_CHILD and HAS_TRITON:
    let_loops_count()
