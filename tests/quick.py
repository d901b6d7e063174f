"""Which parameters of a test run in every suite."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def at_least(often: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """All values as parameters; those that are not in `often` run in `make nightly` alone."""
    return [value if value in often else pytest.param(value, marks=pytest.mark.nightly) for value in values]
