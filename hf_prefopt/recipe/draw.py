"""Selection of rows: a random sample of rows or of prompts, and rows below a maximum length."""

import json
import random
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset

Rows: TypeAlias = Dataset | IterableDataset


def not_too_long(rows: Any, longest: int | None) -> Any:
    """Keep rows with at most `longest` characters (`None`: all rows). Raises `ValueError` if no row remains."""
    if longest is None:
        return rows
    kept = rows.filter(lambda row: characters(row) <= longest)
    if isinstance(kept, Dataset) and len(rows) and not len(kept):
        raise ValueError(f"longest_row={longest} leaves none of {len(rows):,} rows: raise it")
    return kept


def characters(value: Any) -> int:
    """Count the characters of all texts in a row, including texts in nested lists and dicts, and role names."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(characters, parts))


def draw(rows: Rows, count: int | None, seed: int) -> Rows:
    """Sample `count` rows with a seed, and keep their order. If `count` is `None`, return all rows.

    For a stream, the first `count` rows are used instead of a sample.
    """
    if count is None:
        return rows
    if isinstance(rows, IterableDataset):
        return rows.take(count)
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows)))))


def draw_prompts(rows: Rows, count: int | None, seed: int) -> Rows:
    """Sample prompts, and select all rows of each sampled prompt until `count` rows are selected.

    Some rows of the last sampled prompt may be left out. For a stream, and for rows without a column `prompt`, this
    function does the same as `draw`.
    """
    if count is None or isinstance(rows, IterableDataset) or "prompt" not in rows.column_names:
        return draw(rows, count, seed)
    rows_of: dict[str, list[int]] = {}
    for number, prompt in enumerate(rows["prompt"]):
        rows_of.setdefault(json.dumps(prompt), []).append(number)
    prompts = random.Random(seed).sample(list(rows_of), len(rows_of))
    return rows.select(sorted([number for prompt in prompts for number in rows_of[prompt]][:count]))
