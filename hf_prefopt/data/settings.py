"""What a prepared data set was made with, kept in its description, so that it is not used with anything else."""

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
    """The settings that shape tokens, as they are written down; of the tokenizer and its template a short key each."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "tokenizer": _key(vocabulary),
        "chat template": _key(json.dumps(tokenizer.chat_template)),
        "max_length": max_length,
        "truncation_mode": truncation_mode,
        **({"chat_template_kwargs": dict(chat_template_kwargs)} if chat_template_kwargs else {}),
    }


def write_settings(dataset: Dataset | IterableDataset, settings: dict[str, Any]) -> None:
    """Note the settings in the data set's description, which `save_to_disk` keeps and streams do not."""
    dataset.info.description = f"Prepared by hf_prefopt with {json.dumps(settings)}."


def check_settings(
    dataset: Dataset | IterableDataset, settings: dict[str, Any], vocabulary: int
) -> Dataset | IterableDataset:
    """The prepared data set, which was made with these settings.

    Without a note of its settings, as streams are, its rows are looked at: their length and their ids.

    Args:
        vocabulary: the number of tokens that the tokenizer has.

    Raises:
        ValueError: it was prepared with other settings; in a stream when the row is reached.
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
                f"{name} {value!r}, and here it is {settings.get(name)!r}" for name, value in others.items()
            )
            raise ValueError(
                f"this data set was prepared with {differing}: prepare the raw rows anew, or use the same settings"
            )
    return dataset


class _RowCheck:
    """Keeps every prepared row. Raises `ValueError` for one that is too long or has ids of another tokenizer."""

    def __init__(self, max_length: int | None, vocabulary: int):
        self.max_length, self.vocabulary = max_length, vocabulary

    def __call__(self, row: Mapping[str, Any]) -> bool:
        length = len(row["prompt_ids"]) + max(map(len, row["response_ids"]))
        highest = max(token for ids in (row["prompt_ids"], *row["response_ids"]) for token in ids)
        where = f"row {row['row']:,} of this prepared data set"
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"{where} has {length:,} tokens, and max_length={self.max_length}: prepare it anew")
        if highest >= self.vocabulary:
            raise ValueError(
                f"{where} holds token {highest:,}, and the tokenizer has {self.vocabulary:,}: use the tokenizer that "
                "it was prepared with"
            )
        return True


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
