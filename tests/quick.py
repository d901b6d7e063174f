"""Parameters of a test that run in every suite, and parameters that only run nightly."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def at_least(often: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Return all values as parameters; those that are not in `often` only run in `make nightly`."""
    return [value if value in often else pytest.param(value, marks=pytest.mark.nightly) for value in values]
