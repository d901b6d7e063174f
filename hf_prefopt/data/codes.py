"""What the numbers of a column stand for, where one number alone does not tell: all rows are looked at."""

from collections.abc import Collection, Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from hf_prefopt.data.columns import class_names
from hf_prefopt.data.preferences import VERDICTS, by_name, by_sign
from hf_prefopt.data.roles import SUFFIXES

# So many rows that all prefer the second response, by the sign of a number, are hardly chance: 2 ** -16. Scales with a
# sign end at 3, so one larger number tells, too.
_MANY, _LARGEST = 16, 3


def check_codes(dataset: Dataset | IterableDataset, columns: Mapping[str, str]) -> Dataset | IterableDataset:
    """The data set, in which the numbers of labels and of verdicts are what they are read as.

    Args:
        columns: the column of each role.

    Raises:
        ValueError: labels of −1 and 0, in a stream when the second of them is reached; verdicts that count responses
            from 0 while their columns count from 1; a scale without negative numbers where the sign decides. Verdicts
            of a stream are not looked at.
    """
    if "label" in columns:
        dataset = _check_labels(dataset, columns["label"])
    verdict = columns.get("verdict", "")
    if verdict in VERDICTS and isinstance(dataset, Dataset) and verdict not in class_names(dataset):
        values = dataset.unique(verdict)
        numbers = {value for value in values if isinstance(value, int | float) and not isinstance(value, bool)}
        names = (columns["first"], columns["second"])
        if VERDICTS[verdict] is by_name and SUFFIXES[names] == ("1", "2"):
            _refuse_places(verdict, numbers, names)
        if VERDICTS[verdict] is by_sign and (len(dataset) >= _MANY or max(numbers, default=0) > _LARGEST):
            _refuse_scale(verdict, numbers, names)
    return dataset


def _refuse_places(column: str, numbers: Collection[float], names: tuple[str, str]) -> None:
    """Raise `ValueError` for 0 and 1 without 2, of which 1 may well be the second response."""
    if {0, 1}.issubset(numbers) and 2 not in numbers:
        raise ValueError(
            f"column `{column}` holds 0 and 1, and the responses are `{names[0]}` and `{names[1]}`, so 1 may be "
            f"either: write the name of the better column, dataset.map(lambda row: {{{column!r}: "
            f"({names[0]!r}, {names[1]!r})[row[{column!r}]]}}) if 0 is the first"
        )


def _refuse_scale(column: str, numbers: Collection[float], names: tuple[str, str]) -> None:
    """Raise `ValueError` if no number is below zero."""
    if numbers and min(numbers) >= 0 and len(numbers) > 1:
        middle = (min(numbers) + max(numbers)) / 2
        raise ValueError(
            f"column `{column}` holds numbers from {min(numbers):g} to {max(numbers):g}; below 0 means that "
            f"`{names[0]}` is better, above 0 that `{names[1]}` is. Subtract the middle of its scale, "
            f"dataset.map(lambda row: {{{column!r}: row[{column!r}] - {middle:g}}}), or leave the column out"
        )


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
