"""Which parameters of a test are left to `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(values: Iterable[Any], *fast: Any) -> list[Any]:
    """Values of one argument of `pytest.mark.parametrize`, all marked slow but the `fast` ones."""
    values = list(values)
    assert all(value in values for value in fast), "a fast value is not among the values"
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
