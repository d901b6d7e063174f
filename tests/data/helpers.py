"""Helpers of the data tests: rows, unusual cases, and functions that prepare one row."""

import json
from pathlib import Path

from datasets import Dataset

from hf_prefopt.data.formats import FORMATS
from hf_prefopt.data.prepare import prepare_dataset

# The function that reads a row of a format, keyed by the format's name.
READ = {name: row_format.read for name, row_format in FORMATS.items()}

ODD_CASES = {
    case["case"]: case for case in map(json.loads, Path(__file__).with_name("odd_cases.jsonl").open(encoding="utf-8"))
}


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def ask(question: str = "What is the capital of France?") -> list[dict[str, str]]:
    return [say("user", question)]


def reply(content: str) -> list[dict[str, str]]:
    return [say("assistant", content)]


def chat_pair(chosen: str = "Paris.", rejected: str = "Rome.", prompt: list | None = None) -> dict:
    return {"prompt": ask() if prompt is None else prompt, "chosen": reply(chosen), "rejected": reply(rejected)}


def text_pair(prompt: str = "The capital of France is", chosen: str = " Paris.", rejected: str = " Rome.") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def prepare_row(row: dict, tokenizer, **options) -> dict:
    """Return the first prepared row of a dataset with only this row; by default nothing is truncated."""
    return prepare_dataset(Dataset.from_list([row]), tokenizer, **{"max_length": None, **options})[0]


def scored_text(row: dict, response: int, tokenizer) -> str:
    """Decode the scored tokens of a response."""
    tokens = zip(row["response_ids"][response], row["scored_masks"][response], strict=True)
    return tokenizer.decode([token for token, scored in tokens if scored])


def real_rows(name: str) -> list[dict]:
    """Return the rows of this set in unpaired_and_lists.jsonl."""
    lines = map(json.loads, Path(__file__).with_name("unpaired_and_lists.jsonl").open(encoding="utf-8"))
    return [row for row in lines if row.pop("set") == name]
