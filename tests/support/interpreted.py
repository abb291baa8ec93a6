"""Runs tests that need Triton's interpreter in a second pytest process, and reports each under its own name.

Triton decides when it is imported whether kernels are compiled or interpreted, for the whole process, and any earlier
test may have imported it. Tests that use the fixture `interpreter` therefore run in a child pytest process with
TRITON_INTERPRET=1, which collects their files once and then runs one test per request. Under pytest-xdist each worker
that runs such a test starts a child of its own. With TRITON_INTERPRET=1 set from the start the tests run in place.
"""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

SERVER = "INTERPRETED_TESTS_SOCKET"
"""Environment variable of a child: the file descriptor of its connection to the parent."""
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

Outcome = dict[str, str]
FILES = pytest.StashKey[list[str]]()
CHILD = pytest.StashKey["Child"]()


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Marks a test that runs a Triton kernel on the CPU."""
    if not HAS_TRITON:
        pytest.skip("needs Triton; pip install triton==3.6.0 works")


@pytest.hookimpl(trylast=True)  # after -k and -m have deselected tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[FILES] = sorted({str(item.path) for item in items if _is_interpreted(item)})


def _is_interpreted(item: pytest.Item) -> bool:
    return "interpreter" in getattr(item, "fixturenames", ())


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if IS_INTERPRETED or not _is_interpreted(pyfuncitem):
        return None
    outcome = _child_of(pyfuncitem.config).run(pyfuncitem.nodeid)
    if outcome["outcome"] == "skipped":
        pytest.skip(outcome["text"])
    if outcome["outcome"] != "passed":
        pytest.fail(outcome["text"], pytrace=False)
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    if CHILD in config.stash:
        config.stash[CHILD].end()


def _child_of(config: pytest.Config) -> "Child":
    """The child process, started by the first test and again after a test that ended it."""
    if CHILD in config.stash and not config.stash[CHILD].is_alive():
        config.stash[CHILD].end()
        del config.stash[CHILD]
    if CHILD not in config.stash:
        config.stash[CHILD] = Child(config.stash[FILES], config.rootpath)
    return config.stash[CHILD]


class Child:
    """A pytest process that has collected `files` and runs the tests whose ids it is sent, one at a time."""

    def __init__(self, files: list[str], root: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="interpreted-")
        self._output = Path(self._folder.name) / "output"
        ours, theirs = socket.socketpair()
        with ours, theirs, self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
                cwd=root,
                env=_environment(theirs.fileno()),
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
            )
            self._connection = ours.makefile("rw")

    def is_alive(self) -> bool:
        """True while the process can run tests."""
        return self._process.poll() is None

    def run(self, test: str) -> Outcome:
        """The outcome of one test; a test that hangs is ended by pytest's timeout, here or in the child."""
        line = ""
        with contextlib.suppress(ConnectionError):  # then the process has ended
            self._connection.write(test + "\n")
            self._connection.flush()
            line = self._connection.readline()
        if line:
            return dict(json.loads(line))
        self._process.wait(60.0)
        output = self._output.read_text(errors="replace")
        return {"outcome": "failed", "text": f"the child process ended before this test did:\n{output}"}

    def end(self) -> None:
        """Lets the process finish, which writes coverage data; kills it if that takes too long."""
        with contextlib.suppress(ConnectionError):
            self._connection.close()
        try:
            self._process.wait(60.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


def _environment(descriptor: int) -> dict[str, str]:
    """That of this process without its pytest's own settings, such as options and the name of an xdist worker."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**kept, "TRITON_INTERPRET": "1", SERVER: str(descriptor)}


class Server:
    """In a child: runs tests in the order of the parent's requests instead of pytest's."""

    def __init__(self, descriptor: int) -> None:
        connection = socket.socket(fileno=descriptor)
        connection.set_inheritable(False)  # a process that a test leaves behind must not keep it open
        self._connection = connection.makefile("rw")
        self._reports: list[pytest.TestReport] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed:  # files that cannot be imported; pytest reports them and ends
            return None
        items = {item.nodeid: item for item in session.items}
        while test := self._connection.readline().rstrip("\n"):
            self._reports.clear()
            item = items[test]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            self._connection.write(json.dumps(_outcome(self._reports)) + "\n")
            self._connection.flush()
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)


def _outcome(reports: list[pytest.TestReport]) -> Outcome:
    """Of the three phases of a test (setup, call, teardown), the first that did not pass."""
    report = next((report for report in reports if not report.passed), reports[-1])
    text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
    return {"outcome": report.outcome, "text": text}


def pytest_configure(config: pytest.Config) -> None:
    if SERVER in os.environ:
        config.pluginmanager.register(Server(int(os.environ.pop(SERVER))))


def let_loops_count() -> None:
    """Triton 3.6 makes loop bounds by int(array of one element), which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


if IS_INTERPRETED and HAS_TRITON:
    let_loops_count()
