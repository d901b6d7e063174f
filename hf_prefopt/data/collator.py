"""From the rows that the data loader draws to the batch that it yields, in the layout that has been settled.

With a token budget, `per_device_train_batch_size` still says how many examples a rank takes at a time: the rows are
cut, in order, into pieces of at most that many positions, and memory follows the budget.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hf_prefopt.batch import LoaderBatch, PreferenceBatch
from hf_prefopt.data.repeated_rows import examples_of_first_rows

Rows = Sequence[Mapping[str, Any]]


class Collator(Protocol):
    """The collator of a layout."""

    def count_tokens(self, rows: Rows) -> int:
        """The number of positions in the batch of these rows."""

    def __call__(self, rows: Rows) -> PreferenceBatch:
        """The batch of these rows."""


@dataclass
class LoaderCollator:
    """Collates with the collator that `layout` names, which may be decided after the data loaders are made.

    Attributes:
        collators: the collator of each layout. Only those used with `max_tokens` must be able to count tokens.
        layout: which of them to use.
        max_tokens: the most positions in a piece. A single row with more is a piece of its own. `None`: one piece.
    """

    collators: Mapping[str, Collator | Callable[[Rows], PreferenceBatch]]
    layout: str = "padded"
    max_tokens: int | None = None

    def __call__(self, rows: Rows) -> LoaderBatch:
        """The batch of these rows; the examples of rows that are marked `repeated` do not count."""
        collate = self.collators[self.layout]
        pieces = [collate(part) for part in self._cut(rows, collate)]
        new = sum(not row.get("repeated") for row in rows)
        if new < len(rows):
            for piece, counted in zip(pieces, examples_of_first_rows(pieces, new), strict=True):
                piece["counted"] = counted
        return loader_batch(pieces)

    def _cut(self, rows: Rows, collate: Any) -> list[Rows]:
        """The rows in pieces, each as long as the budget allows and at least one row long."""
        if self.max_tokens is None:
            return [rows]
        pieces: list[Rows] = []
        while rows:
            pieces.append(_longest_piece(rows, collate, self.max_tokens))
            rows = rows[len(pieces[-1]) :]
        return pieces


def _longest_piece(rows: Rows, collate: Collator, max_tokens: int) -> Rows:
    counts = range(1, len(rows) + 1)
    fitting = bisect_right(counts, max_tokens, key=lambda count: collate.count_tokens(rows[:count]))
    return rows[: max(1, fitting)]


def loader_batch(pieces: list[PreferenceBatch]) -> LoaderBatch:
    """The batch of these pieces."""
    masks = [piece.get("attention_mask", torch.ones_like(piece["input_ids"])) for piece in pieces]
    return {
        "rows": torch.cat([piece["rows"] for piece in pieces]),
        "input_ids": torch.cat([piece["input_ids"].flatten() for piece in pieces])[None],
        "attention_mask": torch.cat([mask.flatten() for mask in masks])[None],
        "pieces": pieces,
    }
