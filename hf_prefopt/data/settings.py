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


def check_settings(dataset: Dataset | IterableDataset, settings: dict[str, Any]) -> None:
    """Raise `ValueError` if the data set was prepared with other settings. Without a note it is taken as it is."""
    for found in _NOTE.findall(dataset.info.description or ""):
        others = {name: value for name, value in json.loads(found).items() if settings.get(name) != value}
        if others:
            differing = ", ".join(
                f"{name} {value!r}, and here it is {settings.get(name)!r}" for name, value in others.items()
            )
            raise ValueError(
                f"this data set was prepared with {differing}: prepare the raw rows anew, or use the same settings"
            )


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
