"""Check the meaning of the numbers in a column, when a single number is ambiguous and all rows are needed."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from hf_prefopt.data.columns import class_names
from hf_prefopt.data.preferences import VERDICTS, by_name, by_sign
from hf_prefopt.data.roles import SUFFIXES
from hf_prefopt.data.rows import as_number

# A verdict that is read by its sign is suspicious if 16 rows all prefer the second response: the probability of this by
# chance is 2 ** -16. Signed scales end at 3, so a single number above 3 is suspicious, too.
_MANY, _LARGEST = 16, 3


def check_codes(dataset: Dataset | IterableDataset, columns: Mapping[str, str]) -> Dataset | IterableDataset:
    """Check that the numbers in columns of labels and verdicts are read with the right meaning.

    Args:
        columns: The column of each role.

    Returns:
        The dataset. Labels of a stream are checked when they are read. For verdicts of a stream, only the scale in the
        first rows is checked.

    Raises:
        ValueError: If there are labels −1 and 0 (for a stream, when the second of them is read). Also if verdicts count
            responses from 0 but column names count from 1, or if verdicts are read by their sign and none is negative.
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
    """Raise `ValueError` if the verdicts contain 0 and 1 but not 2, because 1 may then be the second response."""
    if {0, 1}.issubset(numbers) and 2 not in numbers:
        raise ValueError(
            f"column `{column}` contains 0 and 1, and the responses are `{names[0]}` and `{names[1]}`, so 1 may mean "
            f"either of them: write the name of the better column, dataset.map(lambda row: {{{column!r}: "
            f"({names[0]!r}, {names[1]!r})[row[{column!r}]]}}) if 0 is the first"
        )


def _numbers(values: Iterable[Any]) -> set[float]:
    return {number for number in map(as_number, values) if math.isfinite(number)}


def describe_codes(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> list[str]:
    """Describe verdicts that are read by their sign, if they prefer the second response in all of these rows.

    Args:
        rows: The first rows.
        columns: The column of each role.
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
    """Check that some numbers are below zero, unless there are too few rows to decide."""
    if isinstance(dataset, IterableDataset):
        return dataset.filter(_Scale(column, names))
    numbers = _numbers(dataset.unique(column))
    if len(dataset) >= _MANY or max(numbers, default=0) > _LARGEST:
        _refuse_scale(column, numbers, names)
    return dataset


def _refuse_scale(column: str, numbers: Collection[float], names: tuple[str, str]) -> None:
    """Raise `ValueError` if there are several different numbers and none is below zero."""
    if numbers and min(numbers) >= 0 and len(numbers) > 1:
        middle = (min(numbers) + max(numbers)) / 2
        raise ValueError(
            f"column `{column}` contains numbers from {min(numbers):g} to {max(numbers):g}, but it is read by sign: "
            f"below 0, `{names[0]}` is better; above 0, `{names[1]}`. Subtract the middle of the scale, "
            f"dataset.map(lambda row: {{{column!r}: row[{column!r}] - {middle:g}}}), or remove the column"
        )


class _Scale:
    """Filter that keeps every row and checks the numbers of the first rows."""

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
    """Filter that keeps every row and remembers the labels of earlier rows."""

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
