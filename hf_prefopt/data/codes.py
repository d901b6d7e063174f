"""Check what the numbers in columns of labels and verdicts mean, where one number alone is ambiguous.

A verdict is a value that says which of two responses is better. Its number may be a sign, or the place of a response
counted from 0 or from 1. A label says whether a response is desirable. Only the numbers of many rows together show
whether the meaning with which they are read is plausible.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from hf_prefopt.data.columns import class_names
from hf_prefopt.data.preferences import VERDICTS, by_name, by_sign
from hf_prefopt.data.roles import SUFFIXES
from hf_prefopt.data.rows import as_number

# Verdicts that are read by their sign are suspicious if none of them is negative, so that none prefers the first
# response. They are rejected if there are at least 16 rows, because the probability of this by chance is then at most
# 2 ** -16. With fewer rows, they are rejected if a number is above 3, because signed scales end at 3.
_MANY, _LARGEST = 16, 3


def check_codes(dataset: Dataset | IterableDataset, columns: Mapping[str, str]) -> Dataset | IterableDataset:
    """Check that the numbers in columns of labels and verdicts are read with the right meaning.

    Args:
        dataset: Raw rows.
        columns: Maps each role, such as "label" or "verdict", to the name of its column.

    Returns:
        The dataset. If it is a stream, labels are checked when they are read. Of its verdicts, only those that are read
        by their sign are checked, and only in the first 16 rows.

    Raises:
        ValueError: If the labels contain both −1 and 0. For a stream, the error is raised when the second of these is
            read. Also if verdicts seem to count the responses from 0 although the names of their columns count from 1,
            or if verdicts are read by their sign although none is negative.
    """
    if "label" in columns:
        dataset = _check_labels(dataset, columns["label"])
    verdict = columns.get("verdict", "")
    if verdict not in VERDICTS or verdict in class_names(dataset):
        return dataset
    names = (columns["first"], columns["second"])
    if VERDICTS[verdict] is by_sign:
        return _check_scale(dataset, verdict, names)
    if VERDICTS[verdict] is by_name and SUFFIXES[names] == ("1", "2") and isinstance(dataset, Dataset):
        _refuse_places(verdict, _numbers(dataset.unique(verdict)), names)
    return dataset


def _refuse_places(column: str, numbers: Collection[float], names: tuple[str, str]) -> None:
    """Raise `ValueError` if the verdicts contain 0 and 1 but not 2.

    They may then be places counted from 0, so that 1 means the second response, whose column has the suffix 2.
    """
    if {0, 1}.issubset(numbers) and 2 not in numbers:
        raise ValueError(
            f"column `{column}` contains 0 and 1, and the responses are `{names[0]}` and `{names[1]}`, so 1 may mean "
            f"either of them: write the name of the better column, dataset.map(lambda row: {{{column!r}: "
            f"({names[0]!r}, {names[1]!r})[row[{column!r}]]}}) if 0 is the first"
        )


def _numbers(values: Iterable[Any]) -> set[float]:
    return {number for number in map(as_number, values) if math.isfinite(number)}


def describe_codes(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """If verdicts are read by their sign and none of them is negative in these rows, return a message that says so.

    Args:
        rows: The first rows of the dataset.
        columns: Maps each role, such as "verdict", to the name of its column.
    """
    verdict = columns.get("verdict", "")
    numbers = _numbers(row.get(verdict) for row in rows)
    if VERDICTS.get(verdict) is not by_sign or not numbers or min(numbers) < 0:
        return []
    first, second = columns["first"], columns["second"]
    return [
        f"`{verdict}` is {', '.join(f'{number:g}' for number in sorted(numbers)[:5])} in the first {len(rows)} rows: "
        f"positive numbers prefer `{second}`, and only negative numbers prefer `{first}`"
    ]


def _check_scale(dataset: Dataset | IterableDataset, column: str, names: tuple[str, str]) -> Dataset | IterableDataset:
    """Check that a verdict that is read by its sign is negative in some rows.

    Fewer than `_MANY` rows of a dataset are checked only if a number is above `_LARGEST`. Of a stream, only the first
    `_MANY` rows are checked.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_Scale(column, names))
    numbers = _numbers(dataset.unique(column))
    if len(dataset) >= _MANY or max(numbers, default=0) > _LARGEST:
        _refuse_scale(column, numbers, names)
    return dataset


def _refuse_scale(column: str, numbers: Collection[float], names: tuple[str, str]) -> None:
    """Raise `ValueError` if there are at least two different numbers and none of them is negative."""
    if numbers and min(numbers) >= 0 and len(numbers) > 1:
        middle = (min(numbers) + max(numbers)) / 2
        raise ValueError(
            f"column `{column}` contains numbers from {min(numbers):g} to {max(numbers):g}, but it is read by sign: "
            f"below 0, `{names[0]}` is better; above 0, `{names[1]}`. Subtract the middle of the scale, "
            f"dataset.map(lambda row: {{{column!r}: row[{column!r}] - {middle:g}}}), or remove the column"
        )


class _Scale:
    """Filter that keeps every row of a stream, and checks the scale of a verdict in the first `_MANY` rows."""

    def __init__(self, column: str, names: tuple[str, str]):
        self.column, self.names, self.first = column, names, list[Any]()

    def __call__(self, row: Mapping[str, Any]) -> bool:
        if len(self.first) < _MANY:
            self.first.append(row[self.column])
            if len(self.first) == _MANY:
                _refuse_scale(self.column, _numbers(self.first), self.names)
        return True


def _check_labels(dataset: Dataset | IterableDataset, column: str) -> Dataset | IterableDataset:
    """Check that the labels do not contain both −1 and 0, because the meaning of 0 is then ambiguous."""
    codes = _LabelCodes(column)
    if isinstance(dataset, IterableDataset):
        return dataset.filter(codes)
    for value in dataset.unique(column):
        codes({column: value})
    return dataset


class _LabelCodes:
    """Filter that keeps every row, and checks that the labels so far do not contain both −1 and 0."""

    def __init__(self, column: str):
        self.column, self.seen = column, set[Any]()

    def __call__(self, row: Mapping[str, Any]) -> bool:
        value = row[self.column]
        self.seen |= {value} & {-1, 0}
        if len(self.seen) == 2:
            raise ValueError(
                f"column `{self.column}` contains −1 and 0: make it true (desirable) or false, and drop other rows"
            )
        return True
