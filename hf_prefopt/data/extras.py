"""Columns that say a number of each example, beside what its kind needs: weights, margins, scores, win rates.

They are taken along whatever the loss, so a row without a number is no bad row yet: it has NaN, which is refused where
a loss asks for it (`check.py`).
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from hf_prefopt.kinds import ExampleKind


def extra_columns(kind: ExampleKind, columns: Collection[str]) -> dict[str, str]:
    """The extras that raw rows of these columns have: the prepared column → the raw one, the first of its names."""
    found = {name: [c for c in extra.columns if c in columns] for name, extra in kind.extras.items()}
    return {name: present[0] for name, present in found.items() if present}


def present_extras(kind: ExampleKind, columns: Collection[str]) -> tuple[str, ...]:
    """The extras that prepared rows of these columns have."""
    return tuple(name for name in kind.extras if name in columns)


def number_or_nan(value: Any) -> float:
    """The value as a float; NaN where it is no number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else math.nan


def read_extras(row: Mapping[str, Any], found: Mapping[str, str]) -> dict[str, list[float]]:
    """The prepared columns of a raw row, which holds one example."""
    return {name: [number_or_nan(row[column])] for name, column in found.items()}
