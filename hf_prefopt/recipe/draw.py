"""Fewer rows than a data set has: drawn at random, by whole prompts, or those that are not too long."""

import json
import random
from typing import Any

from datasets import Dataset, IterableDataset

Rows = Dataset | IterableDataset


def not_too_long(rows: Any, longest: int | None) -> Any:
    """The rows with at most `longest` characters; all of them if it is `None`. Raises `ValueError` if none is left."""
    if longest is None:
        return rows
    kept = rows.filter(lambda row: characters(row) <= longest)
    if isinstance(kept, Dataset) and len(rows) and not len(kept):
        raise ValueError(f"longest_row={longest} leaves none of {len(rows):,} rows: raise it")
    return kept


def characters(value: Any) -> int:
    """The length of all texts in a row, or in whatever it is made of; names of roles count too."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(characters, parts))


def draw(rows: Rows, count: int | None, seed: int) -> Rows:
    """`count` rows at random, the same ones for the same seed, in their order; all of them without a count.

    Of a stream, its first ones.
    """
    if count is None:
        return rows
    if isinstance(rows, IterableDataset):
        return rows.take(count)
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows)))))


def draw_prompts(rows: Rows, count: int | None, seed: int) -> Rows:
    """As `draw`, but prompts at random with all their rows; of the last one as many as are left to take.

    Rows without a column `prompt`, whose responses begin with it, are drawn one by one.
    """
    if count is None or isinstance(rows, IterableDataset) or "prompt" not in rows.column_names:
        return draw(rows, count, seed)
    rows_of: dict[str, list[int]] = {}
    for number, prompt in enumerate(rows["prompt"]):
        rows_of.setdefault(json.dumps(prompt), []).append(number)
    prompts = random.Random(seed).sample(list(rows_of), len(rows_of))
    return rows.select(sorted([number for prompt in prompts for number in rows_of[prompt]][:count]))
