"""Store the settings of a prepared data set in its description, so that it is not used with other settings."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

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
    """Store the settings in the data set's description. `save_to_disk` saves the description; streams lose it."""
    dataset.info.description = f"Prepared by hf_prefopt with {json.dumps(settings)}."


def check_settings(
    dataset: Dataset | IterableDataset, settings: dict[str, Any], vocabulary: int
) -> Dataset | IterableDataset:
    """Check that a prepared data set was prepared with these settings.

    If the data set has no stored settings, like a stream, the lengths and token ids of its rows are checked.

    Args:
        dataset: The prepared data set.
        settings: The current settings.
        vocabulary: Number of tokens of the tokenizer.

    Returns:
        The data set. Rows of a stream are checked when they are read.

    Raises:
        ValueError: If the data set was prepared with other settings; for a stream, when the row is read.
    """
    notes = _NOTE.findall(dataset.info.description or "")
    if not notes:
        check = _RowCheck(settings["max_length"], vocabulary)
        if isinstance(dataset, IterableDataset):
            return dataset.filter(check)
        for row in dataset.select_columns(["prompt_ids", "response_ids", "row"]).with_format(None):
            check(row)
        return dataset
    for found in notes:
        others = {name: value for name, value in json.loads(found).items() if settings.get(name) != value}
        if others:
            differing = ", ".join(
                f"{name} {value!r}, but now it is {settings.get(name)!r}" for name, value in others.items()
            )
            raise ValueError(
                f"this data set was prepared with {differing}: prepare the raw rows again, or use the same settings"
            )
    return dataset


class _RowCheck:
    """Filter that keeps every row. Raises `ValueError` if a row is too long or has ids of another tokenizer."""

    def __init__(self, max_length: int | None, vocabulary: int):
        self.max_length, self.vocabulary = max_length, vocabulary

    def __call__(self, row: Mapping[str, Any]) -> bool:
        length = len(row["prompt_ids"]) + max(map(len, row["response_ids"]))
        highest = max(token for ids in (row["prompt_ids"], *row["response_ids"]) for token in ids)
        where = f"row {row['row']:,} of this prepared data set"
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"{where} has {length:,} tokens, but max_length={self.max_length}: prepare it again")
        if highest >= self.vocabulary:
            raise ValueError(
                f"{where} has token id {highest:,}, but the tokenizer has {self.vocabulary:,} tokens: use the "
                "tokenizer that it was prepared with"
            )
        return True


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
