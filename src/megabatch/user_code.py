"""Functions of the user's own Python files, written `FILE.py:FUNCTION`.

To load one runs the file. Callers therefore take such a name from the command line or from an argument of a call, and
never from a checkpoint, a data set or another file.
"""

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megabatch.errors import SettingsError

_FORM = re.compile(r"(?P<file>.+\.py):(?P<function>[^\W\d]\w*)")


def is_function(text: object) -> bool:
    """True if `text` has the form FILE.py:FUNCTION."""
    return _FORM.fullmatch(str(text)) is not None


def short_name(text: str) -> str:
    """Returns FILE.py:FUNCTION without the folders of FILE, which differ from machine to machine."""
    return re.split(r"[/\\]", text)[-1]


def load_function(option: str, text: str) -> Callable[..., Any]:
    """Runs the file of `text`, FILE.py:FUNCTION, and returns its function; `option` is named in errors.

    The file's folder is appended to `sys.path`, so that the file can import its neighbours.

    Raises:
        SettingsError: there is no such file, it raises an exception, or it has no such function.
    """
    found = _FORM.fullmatch(text)
    assert found is not None
    path, name = Path(found["file"]).expanduser().resolve(), found["function"]
    if not path.is_file():
        raise SettingsError(f"{option} {text}: there is no file {path}; needed: FILE.py:FUNCTION")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"_megabatch_user_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise SettingsError(f"{option} {text}: {path.name} raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        defined = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise SettingsError(f"{option} {text}: {path.name} has no function {name}, only {', '.join(defined) or 'none'}")
    loaded: Callable[..., Any] = function
    return loaded
