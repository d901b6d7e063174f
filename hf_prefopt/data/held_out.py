"""Split a dataset into a part for training and a part for evaluation, so that no prompt is in both parts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset

from hf_prefopt.data.column_layouts import find_layout
from hf_prefopt.data.columns import choose_columns, column_names, first_rows, sample_of, undecoded, without_empty
from hf_prefopt.data.roles import AROUND
from hf_prefopt.data.rows import BadRow, CanonicalRow, shared_length


def split_by_prompt(
    dataset: Dataset,
    test_size: float,
    seed: int = 42,
    *,
    column_mapping: Mapping[str, str] | None = None,
    remove_columns: Sequence[str] | None = None,
    text_as: str = "text",
) -> tuple[Dataset, Dataset]:
    """Split a dataset into rows for training and rows for evaluation, so that no prompt is in both parts.

    The rows are not changed, and both parts keep their order. The order of the rows has no influence on which prompts
    are used for evaluation.

    Args:
        dataset: Raw rows in any known column layout.
        test_size: Share of the rows for evaluation, between 0 and 1 (exclusive). Prompts are drawn, each with all its
            rows, until this share is reached. The evaluation part may therefore exceed the share.
        seed: Seed for drawing the prompts that are used for evaluation.
        column_mapping: As in `PreferenceConfig`.
        remove_columns: As in `PreferenceConfig`.
        text_as: As in `PreferenceConfig`.

    Returns:
        The rows for training, and the rows for evaluation.

    Raises:
        ValueError: If `test_size` is out of range, the columns have no known layout, or all rows have the same prompt.
    """
    keys = prompt_keys_of(dataset, column_mapping, remove_columns, text_as)
    is_held = held_out_rows(keys, test_size, seed)
    return dataset.select(np.flatnonzero(~is_held)), dataset.select(np.flatnonzero(is_held))


def held_out_rows(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Choose the rows that are held out for evaluation.

    Args:
        keys: `[rows]` uint64. A key for each row, equal for rows with the same prompt.
        share: Share of the rows to hold out, between 0 and 1 (exclusive).
        seed: Seed for drawing the prompts that are held out.

    Returns:
        `[rows]` bool. True for rows that are held out.

    Raises:
        ValueError: If `share` is not between 0 and 1 (exclusive), or if there are fewer than two prompts.
    """
    if not 0 < share < 1:
        raise ValueError(f"test size {share!r} must be a share of the rows, above 0 and below 1")
    prompts, counts = np.unique(keys, return_counts=True)
    if len(prompts) < 2:
        raise ValueError(f"all {len(keys):,} rows have the same prompt, so no prompts can be held out")
    drawn = np.array([xxhash.xxh3_64_intdigest(f"{seed} {key}".encode()) for key in prompts], dtype=np.uint64)
    order = np.argsort(drawn, kind="stable")
    enough = int(np.searchsorted(np.cumsum(counts[order]), max(1, round(share * len(keys))))) + 1
    return np.isin(keys, prompts[order[: min(enough, len(prompts) - 1)]])


def prompt_keys_of(
    dataset: Dataset, mapping: Mapping[str, str] | None, removed: Sequence[str] | None, text_as: str
) -> np.ndarray:
    """Return `[rows]` uint64: a key for each row, equal for rows with the same prompt.

    A row that cannot be read gets a key of its own.

    Args:
        dataset: Raw rows.
        mapping: As `column_mapping` in `PreferenceConfig`.
        removed: As `remove_columns` in `PreferenceConfig`.
        text_as: As in `PreferenceConfig`.
    """
    rows = without_empty(undecoded(choose_columns(dataset, mapping, removed)), AROUND)
    layout = find_layout(sample_of(first_rows(rows), column_names(rows)), None, tuple(mapping or ()), text_as)
    keys: list[int] = []
    for batch in rows.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            try:
                prompt = _prompt_of(layout.read(dict(zip(batch, values, strict=True))))
            except BadRow:
                prompt = f"\0row {len(keys)}"
            keys.append(xxhash.xxh3_64_intdigest(prompt.encode(errors="surrogatepass")))
    return np.array(keys, dtype=np.uint64)


def _prompt_of(row: CanonicalRow) -> str:
    """Return the prompt of a row as one text. A text and a single message with this text give the same result."""
    if row.prompt is None:
        # The prompt is in the beginning that the responses share. The answers may also begin with the same words by
        # chance, so the prompt ends at the last line break, question mark or colon of this beginning, if there is one.
        shared = row.responses[0][: min(shared_length(row.responses[0], other) for other in row.responses[1:])]
        end = max(shared.rfind(sign) for sign in "\n?:？：")
        return (shared[: end + 1] or shared).strip()
    if isinstance(row.prompt, str):
        return row.prompt.strip()
    contents: list[Any] = [item.get("content") if isinstance(item, dict) else item for item in row.prompt]
    return contents[0].strip() if len(contents) == 1 and isinstance(contents[0], str) else json.dumps(contents)
