"""Store the settings of a prepared dataset in its description, to detect if it is used with other settings."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from hf_prefopt.data.prepared_rows import PreparedRowCheck

_NOTE = re.compile(r"Prepared by hf_prefopt with (\{.*?\})\.")


def settings_of(
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation_mode: str,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the settings that affect the tokens; tokenizer and chat template are represented by short hashes."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "tokenizer": _key(vocabulary),
        "chat template": _key(json.dumps(tokenizer.chat_template)),
        "max_length": max_length,
        "truncation_mode": truncation_mode,
        **({"chat_template_kwargs": dict(chat_template_kwargs)} if chat_template_kwargs else {}),
    }


def write_settings(dataset: Dataset | IterableDataset, settings: dict[str, Any]) -> None:
    """Store the settings in the dataset's description. `save_to_disk` saves the description; streams lose it."""
    dataset.info.description = f"Prepared by hf_prefopt with {json.dumps(settings)}."


def check_settings(
    dataset: Dataset | IterableDataset, settings: dict[str, Any], vocabulary: int
) -> Dataset | IterableDataset:
    """Check that a prepared dataset was prepared with these settings.

    If the dataset has no stored settings, as is the case for a stream, its rows are checked instead
    (`prepared_rows.PreparedRowCheck`).

    Args:
        dataset: The prepared dataset.
        settings: The current settings.
        vocabulary: Number of tokens of the tokenizer.

    Returns:
        The dataset. Rows of a stream are checked when they are read.

    Raises:
        ValueError: If the dataset was prepared with other settings, or a row is invalid. For a stream, the error is
            raised when the row is read.
    """
    notes = _NOTE.findall(dataset.info.description or "")
    if not notes:
        check, rows = PreparedRowCheck(settings["max_length"], vocabulary), dataset.with_format(None)
        if isinstance(rows, IterableDataset):
            return rows.filter(check)
        for row in rows:
            check(row)
        return dataset
    for found in notes:
        others = {name: value for name, value in json.loads(found).items() if settings.get(name) != value}
        if others:
            differing = ", ".join(
                f"{name} {value!r}, but now it is {settings.get(name)!r}" for name, value in others.items()
            )
            raise ValueError(
                f"this dataset was prepared with {differing}: prepare the raw rows again, or use the same settings"
            )
    return dataset


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
