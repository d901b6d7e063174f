"""What people pass as a data set, as a `Dataset` or an `IterableDataset`: rows, frames, splits, generators."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)


def as_dataset(source: Any, name: str) -> Any:
    """The source as a data set; for evaluation it may be several by name, which are returned as they are.

    Args:
        source: a data set; a list of rows; a frame of pandas or polars; columns, a dict of lists; a generator or a
            function that makes one; a torch data set with a length. Of splits, `train` is what is trained on.
        name: what messages call it: "eval" for what is evaluated, where a dict means several data sets.

    Raises:
        ValueError: it is none of these, its rows are no dicts, or its columns mix types.
    """
    if isinstance(source, Dataset | IterableDataset) or (isinstance(source, Mapping) and name == "eval"):
        return source
    convert = next(convert for types, convert in _SOURCES if _is_a(source, types))
    try:
        return convert(source, name)
    except (TypeError, OverflowError) as error:  # Arrow's errors are ValueError and TypeError
        raise ValueError(f"the data set {name!r} cannot be made of this {_type(source)}: {error}") from error


def check_rows(dataset: Dataset | IterableDataset, name: str) -> None:
    """Raise `ValueError` if the data set has no rows. Whether a stream has rows shows when it is read."""
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"the data set {name!r} has no rows: check how it was loaded and filtered")


def _from_rows(rows: Iterable[Any], name: str) -> Dataset:
    """All keys that any row has become columns."""
    rows = list(rows)
    wrong = next((at for at, row in enumerate(rows) if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise ValueError(
            f"the data set {name!r}: row {wrong:,} is a {_type(rows[wrong])}: make each row a dict, as in "
            "{'prompt': ..., 'chosen': ..., 'rejected': ...}"
        )
    columns = dict.fromkeys(key for row in rows for key in row)
    return _from_columns({column: [row.get(column) for row in rows] for column in columns}, name)


def _from_columns(columns: Mapping[str, list[Any]], name: str) -> Dataset:
    for column, values in columns.items():
        try:
            Dataset.from_dict({column: values})
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(
                f"the data set {name!r}: column {column!r} mixes types, which Arrow refuses: {error}"
            ) from error
    return Dataset.from_dict(dict(columns))


def _from_frame(frame: Any, name: str) -> Dataset:
    if type(frame).__module__.startswith("polars"):
        return Dataset.from_polars(frame)
    return Dataset.from_pandas(frame, preserve_index=False)


def _from_map_style(rows: Any, name: str) -> Dataset:
    return _from_rows((rows[at] for at in range(len(rows))), name)


def _from_function(function: Callable[[], Iterable[Any]], name: str) -> Dataset:
    return _from_rows(function(), name)


def _from_mapping(splits: Mapping[str, Any], name: str) -> Any:
    """The split `train`, or columns."""
    if splits and all(isinstance(values, list) for values in splits.values()):
        return _from_columns(splits, name)
    names = ", ".join(map(str, splits)) or "nothing"
    if not splits or not all(isinstance(split, Dataset | IterableDataset) for split in splits.values()):
        raise ValueError(
            f"the data set {name!r} is a {_type(splits)} of {names}: pass a data set, or columns, each a list"
        )
    if name not in splits:
        raise ValueError(
            f"the data set {name!r} is a {_type(splits)} of {names}: pass one of them, as in "
            f"train_dataset=splits[{next(iter(splits))!r}]"
        )
    others = ", ".join(repr(split) for split in splits if split != name)
    if others:
        logger.warning("%s: the split %r is used, and not %s", name, name, others)
    return splits[name]


def _refuse(cure: str) -> Callable[[Any, str], Any]:
    def refuse(source: Any, name: str) -> Any:
        raise ValueError(f"the data set {name!r} is a {_type(source)} and no datasets.Dataset: {cure}")

    return refuse


# The first entry whose types fit makes the data set; "DataFrame" stands for classes of that name in libraries that
# need not be installed.
_SOURCES: Sequence[tuple[Any, Callable[[Any, str], Any]]] = (
    (
        (str, Path),
        _refuse("load it: load_dataset(name, split='train'), for a file load_dataset('json', data_files=file)"),
    ),
    ("DataFrame", _from_frame),
    (Mapping, _from_mapping),
    ((list, tuple, Iterator), _from_rows),
    (torch.utils.data.IterableDataset, _refuse("make it one: IterableDataset.from_generator(lambda: iter(rows))")),
    (torch.utils.data.Dataset, _from_map_style),
    (Callable, _from_function),
    ("Mixture", _refuse("look at each of its `sources` by itself, with the source's own settings")),
    (object, _refuse("make it a Dataset or an IterableDataset")),
)


def _is_a(source: Any, types: Any) -> bool:
    return type(source).__name__ == types if isinstance(types, str) else isinstance(source, types)


def _type(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__
