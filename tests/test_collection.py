"""Where files lie: pytest collects every test, and no folder of the package is long."""

import ast
import os
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import pytest
from limits import HANG_S

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
SKIPPED_BY_DEFAULT = ["*.egg", ".*", "_darcs", "build", "CVS", "dist", "node_modules", "venv", "{arch}"]
"""pytest's own `norecursedirs`, which other tools that call pytest without our options go by."""


def python_files() -> list[Path]:
    """Every Python file below tests/, as a path from the root of the repository."""
    return sorted(path.relative_to(ROOT) for path in TESTS.rglob("*.py"))


def test_no_file_of_tests_lies_in_a_folder_that_our_options_pass_over(pytestconfig):
    patterns = pytestconfig.getini("norecursedirs")
    folders = {folder for path in python_files() if path.name.startswith("test_") for folder in path.parent.parts}
    assert [folder for folder in folders for pattern in patterns if fnmatch(folder, pattern)] == []


@pytest.mark.slow
def test_gpu_tests_are_collected_where_simplejpeg_is_missing():
    """As on a machine that has a GPU, PyTorch and Triton, and no more."""
    code = "import sys, pytest; sys.modules['simplejpeg'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_every_file_of_tests_is_collected():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False
    )
    assert done.returncode == 0, done.stdout
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected == {path.as_posix() for path in python_files() if path.name.startswith("test_")}


def test_a_file_that_defines_tests_is_named_as_one():
    others = [path for path in python_files() if not path.name.startswith("test_")]
    assert others
    assert {path.as_posix(): defined_tests(path) for path in others if defined_tests(path)} == {}


def defined_tests(path: Path) -> list[str]:
    """Names of functions and classes that pytest would run if the file were named test_*.py."""
    nodes = ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        node.name
        for node in nodes
        if (isinstance(node, functions) and node.name.startswith("test"))
        or (isinstance(node, ast.ClassDef) and node.name.startswith("Test"))
    ]


def test_no_folder_has_a_name_that_pytest_passes_over_by_default():
    folders = [path for top in ("src", "tests") for path in (ROOT / top).rglob("*") if path.is_dir()]
    packages = [path for path in folders if list(path.glob("*.py"))]
    assert packages
    assert [path for path in packages for pattern in SKIPPED_BY_DEFAULT if fnmatch(path.name, pattern)] == []


def test_no_folder_of_the_package_holds_more_than_16_python_files():
    counts = Counter(path.parent for path in (ROOT / "src").rglob("*.py"))
    assert len(counts) > 30
    assert {folder: count for folder, count in counts.items() if count > 16} == {}
