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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent
REPORT = "INTERPRETED_TESTS_REPORT"
IS_CHILD = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

Outcome = dict[str, str]
CHOSEN = pytest.StashKey[list[str]]()
OUTCOMES = pytest.StashKey[dict[str, Outcome]]()


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Asked for by tests that run a Triton kernel on the CPU."""
    if not HAS_TRITON:
        pytest.skip("needs Triton; pip install triton==3.6.0 works")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: the tensors are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(trylast=True)  # after -k and -m have had their say
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[CHOSEN] = [item.nodeid for item in items if is_interpreted(item)]


def is_interpreted(item: pytest.Item) -> bool:
    return FOLDER in item.path.parents and "interpreter" in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if IS_CHILD or not is_interpreted(pyfuncitem):
        return None
    stash = pyfuncitem.config.stash
    if OUTCOMES not in stash:
        stash[OUTCOMES] = run_in_child(stash[CHOSEN], pyfuncitem.config.rootpath)
    outcome = stash[OUTCOMES].get(pyfuncitem.nodeid)
    if outcome is None:
        pytest.fail("the child process ended before this test", pytrace=False)
    if outcome["outcome"] == "skipped":
        pytest.skip(outcome["text"])
    if outcome["outcome"] != "passed":
        pytest.fail(outcome["text"], pytrace=False)
    return True


def run_in_child(tests: list[str], root: Path) -> dict[str, Outcome]:
    """Outcome and failure text of each test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "TRITON_INTERPRET": "1", REPORT: str(report)}
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=170, check=False
        )
        if not report.exists():
            pytest.fail(f"the child process ran no test:\n{done.stdout}{done.stderr}", pytrace=False)
        outcomes = map(json.loads, report.read_text().splitlines())
        return {outcome["test"]: outcome for outcome in outcomes}


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
