"""Convert data in any supported form, such as a list of rows, a frame or a generator, to a `Dataset`."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)


def as_dataset(source: Any, name: str) -> Any:
    """Convert the source to a dataset. For evaluation, a dict (of several datasets) is returned unchanged.

    Args:
        source: A dataset; a list of rows; a pandas or polars frame; a dict of columns, each a list; a generator or a
            function that returns a generator; a torch dataset with a length; or a dict of splits, from which the
            split `name` is used.
        name: Name of the dataset, also in messages: "train", or "eval" for evaluation.

    Raises:
        ValueError: If the source is none of these, its rows are not dicts, or a column mixes types.
    """
    if isinstance(source, Dataset | IterableDataset) or (isinstance(source, Mapping) and name == "eval"):
        return source
    convert = next(convert for types, convert in _SOURCES if _is_a(source, types))
    try:
        return convert(source, name)
    except (TypeError, OverflowError) as error:  # Arrow's errors are ValueError and TypeError
        raise ValueError(f"the dataset {name!r} cannot be built from this {_type(source)}: {error}") from error


def check_rows(dataset: Dataset | IterableDataset, name: str) -> None:
    """Raise `ValueError` if the dataset has no rows. An empty stream is detected only when it is read."""
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"the dataset {name!r} has no rows: check how it was loaded and filtered")


def _from_rows(rows: Iterable[Any], name: str) -> Dataset:
    """Build a dataset with a column for each key that occurs in any row. A missing key becomes None."""
    rows = list(rows)
    wrong = next((at for at, row in enumerate(rows) if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise ValueError(
            f"the dataset {name!r}: row {wrong:,} is a {_type(rows[wrong])}: make each row a dict, as in "
            "{'prompt': ..., 'chosen': ..., 'rejected': ...}"
        )
    columns = dict.fromkeys(key for row in rows for key in row)
    return _from_columns({column: [row.get(column) for row in rows] for column in columns}, name)


def _from_columns(columns: Mapping[str, list[Any]], name: str) -> Dataset:
    for column, values in columns.items():
        try:
            Dataset.from_dict({column: values})
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"the dataset {name!r}: {_fault(column, values)}: {error}") from error
    return Dataset.from_dict(dict(columns))


def _fault(column: str, values: Sequence[Any]) -> str:
    """Describe the first value that Arrow cannot store, by itself or in one column with the values before it."""
    for at, value in enumerate(values):
        if not _is_storable(column, [value]):
            return f"row {at:,}: `{column}` is a value that Arrow cannot store; correct it or drop the row"
    end = next(end for end in range(1, len(values) + 1) if not _is_storable(column, values[:end]))
    types = list(dict.fromkeys(_type(value) for value in values[:end] if value is not None))
    told = f"of type {types[-1]}, and of type {types[0]} in the rows before it" if len(types) > 1 else "of another form"
    return f"row {end - 1:,}: `{column}` is {told}; give all rows the same form"


def _is_storable(column: str, values: Sequence[Any]) -> bool:
    try:
        Dataset.from_dict({column: list(values)})
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def _from_frame(frame: Any, name: str) -> Dataset:
    if type(frame).__module__.startswith("polars"):
        return Dataset.from_polars(frame)
    # An index that has a name, or that does not hold integers, becomes a column.
    is_column = any(level is not None for level in frame.index.names) or frame.index.dtype.kind not in "iu"
    return Dataset.from_pandas(frame, preserve_index=is_column)


def _from_map_style(rows: Any, name: str) -> Dataset:
    return _from_rows((rows[at] for at in range(len(rows))), name)


def _from_function(function: Callable[[], Iterable[Any]], name: str) -> Dataset:
    return _from_rows(function(), name)


def _from_mapping(splits: Mapping[str, Any], name: str) -> Any:
    """Return the split `name` of a dict of splits, or build a dataset from a dict of columns."""
    if splits and all(isinstance(values, list) for values in splits.values()):
        return _from_columns(splits, name)
    names = ", ".join(map(str, splits)) or "nothing"
    if not splits or not all(isinstance(split, Dataset | IterableDataset) for split in splits.values()):
        raise ValueError(
            f"the dataset {name!r} is a {_type(splits)} of {names}: pass a dataset, or a dict of columns, each a list"
        )
    if name not in splits:
        raise ValueError(
            f"the dataset {name!r} is a {_type(splits)} of {names}: pass one of them, as in "
            f"train_dataset=splits[{next(iter(splits))!r}]"
        )
    others = ", ".join(repr(split) for split in splits if split != name)
    if others:
        logger.warning("%s: the split %r is used, but not %s", name, name, others)
    return splits[name]


def _refuse(cure: str) -> Callable[[Any, str], Any]:
    def refuse(source: Any, name: str) -> Any:
        raise ValueError(f"the dataset {name!r} is a {_type(source)}, not a datasets.Dataset: {cure}")

    return refuse


# The first entry whose types match the source converts it. A string such as "DataFrame" matches classes with this name,
# so that the library that defines the class (pandas or polars) need not be installed.
_SOURCES: Sequence[tuple[Any, Callable[[Any, str], Any]]] = (
    (
        (str, Path),
        _refuse("load it: load_dataset(name, split='train'), for a file load_dataset('json', data_files=file)"),
    ),
    ("DataFrame", _from_frame),
    (Mapping, _from_mapping),
    ((list, tuple, Iterator), _from_rows),
    (torch.utils.data.IterableDataset, _refuse("convert it: IterableDataset.from_generator(lambda: iter(rows))")),
    (torch.utils.data.Dataset, _from_map_style),
    (Callable, _from_function),
    ("Mixture", _refuse("pass each of its `sources` separately, with the source's own settings")),
    (object, _refuse("convert it to a Dataset or an IterableDataset")),
)


def _is_a(source: Any, types: Any) -> bool:
    return type(source).__name__ == types if isinstance(types, str) else isinstance(source, types)


def _type(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__
