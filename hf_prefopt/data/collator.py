"""A batch's rows as one micro-batch, or as several under a token budget, in the layout that is settled on.

With a budget, `per_device_train_batch_size` goes on saying how many examples a rank takes at a time, and memory follows
the budget: the rows are cut, in their order, into pieces whose positions stay below it.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hf_prefopt.batch import PreferenceBatch
from hf_prefopt.data.repeated_rows import examples_of_first_rows

Rows = Sequence[Mapping[str, Any]]


class Collator(Protocol):
    """What a layout's collator does."""

    def count_tokens(self, rows: Rows) -> int:
        """The positions that the batch of these rows computes."""

    def __call__(self, rows: Rows) -> PreferenceBatch:
        """The batch of these rows."""


@dataclass
class MicroBatchCollator:
    """Collates in the layout that `layout` names at the time, so that it can be settled after data loaders are made.

    Attributes:
        collators: a collator for each layout.
        layout: which of them is used.
        max_tokens: the most positions of a piece; a single row beyond it is a piece of its own. `None`: no pieces.
    """

    collators: dict[str, Collator]
    layout: str = "padded"
    max_tokens: int | None = None

    def __call__(self, rows: Rows) -> PreferenceBatch | dict[str, list[PreferenceBatch]]:
        """The batch of these rows, or with a budget `{"pieces": [batch, …]}`."""
        collate = self.collators[self.layout]
        cut = [rows] if self.max_tokens is None else _cut(rows, collate, self.max_tokens)
        pieces = [collate(piece) for piece in cut]
        new = sum(not row.get("repeated") for row in rows)
        if new < len(rows):
            for piece, counted in zip(pieces, examples_of_first_rows(pieces, new), strict=True):
                piece["counted"] = counted
        return pieces[0] if self.max_tokens is None else {"pieces": pieces}


def _cut(rows: Rows, collate: Collator, max_tokens: int) -> list[Rows]:
    """The rows, in their order, in pieces that are as long as the budget lets them be, and have at least one row."""
    pieces: list[Rows] = []
    start = 0
    while start < len(rows):
        pieces.append(_longest_piece(rows[start:], collate, max_tokens))
        start += len(pieces[-1])
    return pieces


def _longest_piece(rows: Rows, collate: Collator, max_tokens: int) -> Rows:
    counts = range(1, len(rows) + 1)
    fitting = bisect_right(counts, max_tokens, key=lambda count: collate.count_tokens(rows[:count]))
    return rows[: max(1, fitting)]


def pieces_of(batch: Mapping[str, Any]) -> list[PreferenceBatch]:
    """The micro-batches of what the collator returned."""
    return batch.get("pieces", [batch])
