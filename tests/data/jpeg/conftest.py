from pathlib import Path

import pytest

from megabatch.data.jpeg import library
from megabatch.errors import SettingsError


@pytest.fixture(scope="session")
def library_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the library built from the current sources, not the installed one."""
    folder = tmp_path_factory.mktemp("library")
    try:
        library.build(folder)
    except SettingsError as error:
        pytest.skip(f"the compiled decoder cannot be built here: {error}")
    return folder


@pytest.fixture
def compiled(library_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the test with the library built from the current sources."""
    monkeypatch.setattr(library, "library_folder", library_folder)
    library._function.cache_clear()
    assert library.is_available()
    yield
    library._function.cache_clear()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs the test as if the library had not been built."""
    monkeypatch.setattr(library, "library_folder", tmp_path)
    library._function.cache_clear()
    assert not library.is_available()
    yield
    library._function.cache_clear()


@pytest.fixture(params=["compiled", "plain"])
def either(request: pytest.FixtureRequest) -> str:
    """Runs the test twice: with and without the compiled library."""
    request.getfixturevalue(request.param)
    return request.param
