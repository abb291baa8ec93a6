"""`import megabatch` offers its public names, each documented, without importing torch."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG_S

import megabatch


@pytest.mark.parametrize("name", megabatch.__all__)
def test_every_public_name_can_be_imported_and_is_documented(name):
    assert len(inspect.getdoc(getattr(megabatch, name)) or "") > 40


def test_names_for_type_checkers_are_those_at_run_time():
    tree = ast.parse(Path(megabatch.__file__).read_text())
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("megabatch.")
        for alias in node.names
    }
    assert typed == {name: f"megabatch.{module}" for name, module in megabatch._HOMES.items()}


def test_an_unknown_name_is_an_attribute_error_that_lists_the_names():
    with pytest.raises(AttributeError, match=r"no attribute 'Loader'.*TrainLoader"):
        megabatch.Loader  # noqa: B018


@pytest.mark.parametrize(
    "statement", ["import megabatch", "import megabatch.data.fetching.catalog, megabatch.data.loading.split"]
)
def test_importing_does_not_import_torch(statement):
    code = f"import sys; {statement}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=HANG_S, check=False).returncode == 0


@pytest.mark.parametrize("package", ["nn", "optim", "data", "comm"])
def test_a_package_offers_its_public_names_too(package):
    module = importlib.import_module(f"megabatch.{package}")
    homes = {name for name, home in megabatch._HOMES.items() if home.startswith(f"{package}.")}
    assert homes
    assert all(getattr(module, name) is getattr(megabatch, name) for name in homes)
    with pytest.raises(AttributeError, match=f"'megabatch.{package}' has no attribute 'Recipe'"):
        module.Recipe  # noqa: B018


@pytest.mark.parametrize(
    ("former", "module"),
    [("cache_folder", "files"), ("data.parquet", "data.sources.parquet"), ("data.decode", "data.jpeg.decode")],
)
def test_modules_that_were_renamed_can_be_imported_by_their_former_names(former, module):
    old, new = (importlib.import_module(f"megabatch.{name}") for name in (former, module))
    shared = [name for name in old.__all__ if hasattr(new, name)]
    assert shared
    assert all(getattr(old, name) is getattr(new, name) for name in shared)
