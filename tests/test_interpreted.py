"""The child process for Triton's interpreter reports each test's outcome, also of one that ends the process."""

from pathlib import Path

import pytest
from interpreted import Child

TESTS = """
import os, pytest

def test_passes():
    assert os.environ["TRITON_INTERPRET"] == "1"

def test_fails():
    assert 1 + 1 == 3

def test_skips():
    pytest.skip("no such device")

def test_ends_the_process():
    os.write(1, b"last words")
    os._exit(3)
"""


@pytest.mark.slow
def test_a_child_runs_tests_in_any_order_and_a_dead_child_is_a_failure(tmp_path):
    support = Path(__file__).parent / "support"
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {support}\n")
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["interpreted"]\n')
    (tmp_path / "test_it.py").write_text(TESTS)
    child = Child(["test_it.py"], tmp_path)
    try:
        assert child.run("test_it.py::test_skips")["text"].endswith("no such device")
        assert child.run("test_it.py::test_fails")["outcome"] == "failed"
        assert child.run("test_it.py::test_passes") == {"outcome": "passed", "text": ""}
        assert child.is_alive()
        ended = child.run("test_it.py::test_ends_the_process")
        assert ended["outcome"] == "failed"
        assert "ended before this test did" in ended["text"]
        assert not child.is_alive()
    finally:
        child.end()
