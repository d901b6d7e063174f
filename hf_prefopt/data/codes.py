"""What the numbers of a column stand for, where one number alone does not tell: all rows are looked at."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from hf_prefopt.data.columns import class_names
from hf_prefopt.data.preferences import VERDICTS, by_name, by_sign
from hf_prefopt.data.roles import SUFFIXES
from hf_prefopt.data.rows import as_number

# So many rows that all prefer the second response, by the sign of a number, are hardly chance: 2 ** -16. Scales with a
# sign end at 3, so one larger number tells, too.
_MANY, _LARGEST = 16, 3


def check_codes(dataset: Dataset | IterableDataset, columns: Mapping[str, str]) -> Dataset | IterableDataset:
    """The data set, in which the numbers of labels and of verdicts are what they are read as.

    Args:
        columns: the column of each role.

    Raises:
        ValueError: labels of −1 and 0, in a stream when the second of them is reached; verdicts that count responses
            from 0 while their columns count from 1; a scale without negative numbers where the sign decides. Of a
            stream's verdicts only the scale is looked at, in its first rows.
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
    """Raise `ValueError` for 0 and 1 without 2, of which 1 may well be the second response."""
    if {0, 1}.issubset(numbers) and 2 not in numbers:
        raise ValueError(
            f"column `{column}` holds 0 and 1, and the responses are `{names[0]}` and `{names[1]}`, so 1 may be "
            f"either: write the name of the better column, dataset.map(lambda row: {{{column!r}: "
            f"({names[0]!r}, {names[1]!r})[row[{column!r}]]}}) if 0 is the first"
        )


def _numbers(values: Iterable[Any]) -> set[float]:
    return {number for number in map(as_number, values) if math.isfinite(number)}


def describe_codes(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """What to say of a verdict by its sign that prefers the second response in all of these rows.

    Args:
        rows: the first rows.
        columns: the column of each role.
    """
    verdict = columns.get("verdict", "")
    numbers = _numbers(row.get(verdict) for row in rows)
    if VERDICTS.get(verdict) is not by_sign or not numbers or min(numbers) < 0:
        return []
    first, second = columns["first"], columns["second"]
    return [
        f"`{verdict}` is {', '.join(f'{number:g}' for number in sorted(numbers)[:5])} in the first {len(rows)} rows: "
        f"above 0 it prefers `{second}`, and `{first}` only below 0"
    ]


def _check_scale(dataset: Dataset | IterableDataset, column: str, names: tuple[str, str]) -> Dataset | IterableDataset:
    """The data set, some of whose numbers are below zero, if it is not too small to tell."""
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_Scale(column, names))
    numbers = _numbers(dataset.unique(column))
    if len(dataset) >= _MANY or max(numbers, default=0) > _LARGEST:
        _refuse_scale(column, numbers, names)
    return dataset


def _refuse_scale(column: str, numbers: Collection[float], names: tuple[str, str]) -> None:
    """Raise `ValueError` if no number is below zero."""
    if numbers and min(numbers) >= 0 and len(numbers) > 1:
        middle = (min(numbers) + max(numbers)) / 2
        raise ValueError(
            f"column `{column}` holds numbers from {min(numbers):g} to {max(numbers):g}; below 0 means that "
            f"`{names[0]}` is better, above 0 that `{names[1]}` is. Subtract the middle of its scale, "
            f"dataset.map(lambda row: {{{column!r}: row[{column!r}] - {middle:g}}}), or leave the column out"
        )


class _Scale:
    """Keeps every row, and looks at the numbers of the first ones."""

    def __init__(self, column: str, names: tuple[str, str]):
        self.column, self.names, self.first = column, names, list[Any]()

    def __call__(self, row: Mapping[str, Any]) -> bool:
        if len(self.first) < _MANY:
            self.first.append(row[self.column])
            if len(self.first) == _MANY:
                _refuse_scale(self.column, _numbers(self.first), self.names)
        return True


def _check_labels(dataset: Dataset | IterableDataset, column: str) -> Dataset | IterableDataset:
    """The data set, whose labels are not −1, 0 and 1, of which nobody knows what 0 means."""
    codes = _LabelCodes(column)
    if isinstance(dataset, IterableDataset):
        return dataset.filter(codes)
    for value in dataset.unique(column):
        codes({column: value})
    return dataset


class _LabelCodes:
    """Keeps every row, and remembers the labels of those before it."""

    def __init__(self, column: str):
        self.column, self.seen = column, set[Any]()

    def __call__(self, row: Mapping[str, Any]) -> bool:
        value = row[self.column]
        self.seen |= {value} & {-1, 0}
        if len(self.seen) == 2:
            raise ValueError(
                f"column `{self.column}` holds −1 and 0: make it true (desirable) or false, and drop other rows"
            )
        return True
