"""Mixtures of datasets, from the setting `datasets`. Entries have TRL's keys and a few additional keys.

    datasets:
      - path: trl-lib/ultrafeedback_binarized
      - path: Intel/orca_dpo_pairs
        weight: 0.5
      - path: my/answers.jsonl
        weight: 2
        column_mapping: {prompt: question, chosen: answer_a, rejected: answer_b}

On the command line an entry is a path or JSON: --datasets a/b '{"path": "c/d", "weight": 2}'
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from datasets import load_dataset

from hf_prefopt.data.files import load_splits
from hf_prefopt.data.mixtures import Mixture, Source
from hf_prefopt.data.splits import evaluation_split, training_split


@dataclass(frozen=True)
class Entry:
    """One dataset of a mixture.

    Attributes:
        path, name, data_dir, data_files, split, columns: Data to load, as in TRL's `DatasetConfig`.
        weight, fraction, column_mapping, remove_columns, text_as: see `hf_prefopt.Source`.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None
    weight: float = 1.0
    fraction: float | None = None
    column_mapping: dict[str, str] | None = None
    remove_columns: list[str] | None = None
    text_as: str | None = None

    @property
    def label(self) -> str:
        """The name of the dataset in messages."""
        return self.path + "".join(f" {part}" for part in (self.name, self.split) if part not in (None, "train"))


def read_entries(given: list[Any]) -> list[Entry]:
    """Parse the entries of `datasets`. Raises `ValueError` for an invalid entry or an unknown key."""
    entries = []
    for entry in given:
        if isinstance(entry, str):
            entry = _from_text(entry)
        unknown = [key for key in entry if key not in {field.name for field in fields(Entry)}]
        if unknown or "path" not in entry:
            wrong = f"has the unknown key {unknown[0]!r}" if unknown else "has no path"
            raise ValueError(f"datasets: {entry} {wrong}: the keys are {', '.join(f.name for f in fields(Entry))}")
        entries.append(Entry(**entry))
    return entries


def _from_text(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return {"path": text}
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"datasets: {text} is neither a path nor JSON: {error}") from None


def load_mixture(
    entries: list[Entry], streaming: bool, seed: int, keep: Callable[[Any], Any], reading: Mapping[str, Any]
) -> tuple[Mixture, Mixture | None]:
    """Load the training mixture and the evaluation mixture.

    The evaluation mixture contains each row of the evaluation splits once. It is `None` if no dataset has an evaluation
    split.

    Args:
        keep: Function that gets the rows of a dataset, and returns those that are not too long.
        reading: Default values of `column_mapping`, `remove_columns` and `text_as` for all entries.

    Raises:
        ValueError: If a dataset cannot be loaded or the mixture is invalid.
    """
    train, test = [], []
    for entry in entries:
        splits = _splits(entry, streaming)
        trained = training_split(splits, entry.split)
        evaluated = evaluation_split(splits, "test", trained)
        train.append(_source(entry, keep(splits[trained]), reading, entry.weight, entry.fraction))
        test += [_source(entry, keep(splits[evaluated]), reading)] if evaluated else []
    return Mixture(train, seed), Mixture(test, seed) if test else None


def _splits(entry: Entry, streaming: bool) -> Any:
    if entry.data_dir is None and entry.data_files is None:
        return load_splits(entry.path, entry.name, streaming)
    options = {"name": entry.name, "data_dir": entry.data_dir, "data_files": entry.data_files, "streaming": streaming}
    return load_dataset(entry.path, **options)


def _source(
    entry: Entry, rows: Any, reading: Mapping[str, Any], weight: float = 1.0, fraction: float | None = None
) -> Source:
    rows = rows.select_columns(entry.columns) if entry.columns else rows
    own = {key: value if getattr(entry, key) is None else getattr(entry, key) for key, value in reading.items()}
    return Source(rows, entry.label, weight, fraction, **own)
