"""Prepared rows to a batch in the "shared" layout: one row of tokens without padding, every prompt in it once.

For each group `[prompt | response 1 | … | response K]`, each response's positions starting again at the prompt's
length. What a response may look at is said by segments (see `scoring.attention`).

Shapes: T tokens of the row; S segments, one per response; Tk gathered keys; N scored tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_prefopt.data.batch import PreferenceBatch
from hf_prefopt.data.collate import index_examples


@dataclass
class SharedCollator:
    """Collates prepared rows (see `prepare_dataset`) into a `PreferenceBatch` of one row.

    Example:
        >>> row = {"prompt_ids": [5, 6], "response_ids": [[7, 8], [9]], "scored_masks": [[1, 1], [1]],
        ...        "pairs": [[0, 1]], "row": 3}
        >>> batch = SharedCollator()([row])
        >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
        ([[5, 6, 7, 8, 9]], [[0, 1, 2, 3, 2]])
        >>> batch["scored_rows"].tolist(), batch["targets"].tolist()
        ([1, 2, 1], [7, 8, 9])
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        """The batch of these rows. Raises `ValueError` for a response without a scored token that can be predicted."""
        prompts = np.repeat([len(row["prompt_ids"]) for row in rows], [len(row["response_ids"]) for row in rows])
        lengths = np.array([len(response) for row in rows for response in row["response_ids"]])
        # The first response of a group brings the prompt along: its segment's queries are both.
        first = np.concatenate([np.arange(len(row["response_ids"])) == 0 for row in rows])
        queries = lengths + prompts * first
        query_ends, keys = np.cumsum(queries), prompts + lengths
        response_starts = query_ends - lengths
        prompt_starts = np.maximum.accumulate(np.where(first, query_ends - queries, 0))

        tokens = [ids for row in rows for ids in (row["prompt_ids"], *row["response_ids"])]
        input_ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in tokens])
        # Keys of a segment: its prompt's positions, then its own; `inside` counts within the segment.
        inside = _count_up(keys)
        of_prompt = inside < np.repeat(prompts, keys)
        key_index = np.where(
            of_prompt, inside + np.repeat(prompt_starts, keys), inside + np.repeat(response_starts - prompts, keys)
        )
        scored = np.concatenate([np.asarray(mask, dtype=bool) for row in rows for mask in row["scored_masks"]])
        response_index = np.repeat(np.arange(len(lengths)), lengths)[scored]
        place = _count_up(lengths)[scored]
        response_lengths = np.bincount(response_index, minlength=len(lengths))
        if (place + prompts[response_index] == 0).any() or (response_lengths == 0).any():
            raise ValueError("a response scores no token, or the first of its sequence, which nothing predicts")

        position = place + response_starts[response_index]
        last_of_prompt = prompt_starts[response_index] + prompts[response_index] - 1
        batch = {
            "input_ids": input_ids[None],
            "position_ids": (_count_up(queries) + np.repeat(np.where(first, 0, prompts), queries))[None],
            "segment_queries": np.concatenate([[0], query_ends]).astype(np.int32),
            "segment_keys": np.concatenate([[0], np.cumsum(keys)]).astype(np.int32),
            "segment_key_index": key_index,
            "scored_rows": np.where(place == 0, last_of_prompt, position - 1),
            "targets": input_ids[position],
            "response_index": response_index,
            "response_lengths": response_lengths,
            **index_examples(rows),
        }
        tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
        return PreferenceBatch(**tensors, segment_longest=(int(queries.max()), int(keys.max())))


def _count_up(lengths: np.ndarray) -> np.ndarray:
    """0, 1, …, n − 1 for each n in `lengths`, end to end."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


@dataclass
class LayoutCollator:
    """Collates in the layout that `layout` names at the time, so that it can be settled after data loaders are made.

    Attributes:
        collators: a collator for each layout.
        layout: which of them is used.
    """

    collators: dict[str, Callable[[Sequence[Mapping[str, Any]]], PreferenceBatch]]
    layout: str = "padded"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        """The batch of these rows."""
        return self.collators[self.layout](rows)
