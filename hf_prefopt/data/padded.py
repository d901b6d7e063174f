"""Prepared rows to a batch in the "padded" layout: one right-padded sequence [prompt | response] for each response.

Every causal language model takes this layout. It repeats the prompt and pads; the layout that does neither is "shared".

Shapes: R responses of all rows, group by group; T tokens of the longest sequence (padded); N scored tokens; B pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
import torch

from hf_prefopt.batch import PreferenceBatch
from hf_prefopt.data.group import Group, group_rows, index_examples


@dataclass
class PaddedCollator:
    """Collates prepared rows (see `prepare_dataset`) into a `PreferenceBatch`.

    Attributes:
        pad_token_id: fills `input_ids` after the end of a sequence. It may well be the EOS: nothing here is told by the
            pad token, everything by lengths.
        pad_to_multiple_of: T is rounded up to a multiple of this.

    Example:
        >>> row = {"prompt_ids": [5, 6], "response_ids": [[7, 8], [9]], "scored_masks": [[1, 1], [1]],
        ...        "pairs": [[0, 1]], "row": 3}
        >>> batch = PaddedCollator(pad_token_id=0)([row])
        >>> batch["input_ids"].tolist()
        [[5, 6, 7, 8], [5, 6, 9, 0]]
        >>> batch["scored_rows"].tolist(), batch["targets"].tolist()
        ([1, 2, 5], [7, 8, 9])
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def count_tokens(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """The positions that the batch of these rows computes, padding included."""
        groups = group_rows(rows).groups
        lengths = [len(group.prompt_ids) + len(ids) for group in groups for ids, _ in group.responses]
        return len(lengths) * self._width(max(lengths))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        """The batch of these rows. Raises `ValueError` for a response without a scored token that can be predicted."""
        grouped = group_rows(rows)
        tokens, scored, lengths = _concatenate(grouped.groups)
        width = self._width(int(lengths.max()))
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)

        input_ids = np.full((len(lengths), width), self.pad_token_id, dtype=np.int64)
        input_ids[sequence, position] = tokens
        response_index = sequence[scored]
        response_lengths = np.bincount(response_index, minlength=len(lengths))
        if (position[scored] == 0).any() or (response_lengths == 0).any():
            raise ValueError("a response scores no token, or the first of its sequence, which nothing predicts")

        batch = {
            "input_ids": input_ids,
            "attention_mask": (np.arange(width) < lengths[:, None]).astype(np.int64),
            # The hidden state one place before a token predicts it: for a response's first, the prompt's last.
            "scored_rows": response_index * width + position[scored] - 1,
            "targets": tokens[scored],
            "response_index": response_index,
            "response_lengths": response_lengths,
            **index_examples(rows, grouped.places),
        }
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in batch.items()}
        return cast(PreferenceBatch, tensors | {"longest_response": int(response_lengths.max())})

    def _width(self, longest: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-longest // multiple) * multiple


def _concatenate(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All sequences end to end: their tokens and whether each is scored, both `[sum of lengths]`; the lengths `[R]`."""
    tokens: list[Sequence[int]] = []
    scored: list[Sequence[int]] = []
    lengths: list[int] = []
    for group in groups:
        unscored = [0] * len(group.prompt_ids)
        for response, mask in group.responses:
            tokens += (group.prompt_ids, response)
            scored += (unscored, mask)
            lengths.append(len(group.prompt_ids) + len(response))
    total = sum(lengths)
    flat_tokens = np.fromiter(chain.from_iterable(tokens), dtype=np.int64, count=total)
    flat_scored = np.fromiter(chain.from_iterable(scored), dtype=bool, count=total)
    return flat_tokens, flat_scored, np.array(lengths)
