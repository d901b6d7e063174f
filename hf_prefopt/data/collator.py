"""From the rows that the data loader draws to the batch that it yields, in the layout that has been settled.

With a token budget, `per_device_train_batch_size` still says how many examples a rank takes at a time: the rows are
cut, in order, into pieces of at most that many positions, and memory follows the budget.

When rows do not fill the last batch of every rank, accelerate repeats earlier rows, so that all ranks stay in step.
They are computed, and their examples do not count. For a data set its length says which rows these are; a stream is
filled up here, with rows that say so.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from hf_prefopt.batch import LoaderBatch, PreferenceBatch
from hf_prefopt.data.prompts import with_scored_prompts
from hf_prefopt.kinds import EXAMPLE_ENTRIES


def rows_that_count(rows: int, share: int, rank: int, world_size: int) -> int:
    """How many rows of a rank's last batch are there for the first time.

    Args:
        rows: of the data set. share: rows that a rank takes at a time.

    Example:
        >>> [rows_that_count(7, 2, rank, 2) for rank in (0, 1)]  # rows 4, 5 and rows 6, 0
        [2, 1]
    """
    last = rows % (share * world_size) or share * world_size
    return min(max(last - rank * share, 0), share)


def examples_of_first_rows(pieces: list[PreferenceBatch], count: int) -> list[Tensor]:
    """For each piece of a batch, `[B]` bool: whether an example is of the batch's first `count` rows."""
    # A row's first example has the number 0, so that rows are counted 1, 1, 2, … over their examples.
    lengths = [len(piece["rows"]) for piece in pieces]
    row = (torch.cat([piece["pair_in_row"] for piece in pieces]) == 0).cumsum(0)
    return list((row <= count).split(lengths))


def keep_examples(batch: PreferenceBatch, kept: Tensor | slice) -> PreferenceBatch:
    """The batch with some of its examples, `[B]` bool or a slice of them; it runs as long as before.

    Without any it changes nothing: ranks of a sharded model call its layers together, so one that has nothing to do
    runs such a batch.
    """
    entries = cast(dict[str, Any], batch)
    names = [name for name in (*EXAMPLE_ENTRIES, "counted") if name in entries]
    return cast(PreferenceBatch, {**entries, **{name: entries[name][kept] for name in names}})


class EvenStream(IterableDataset):
    """A stream whose number of rows is a multiple of some number: its first rows come again, `repeated` in them.

    Args:
        stream: rows, which are mappings.
        multiple: of what the number of rows is to be; the rows that all ranks take at a time.
    """

    def __init__(self, stream: Iterable[Mapping[str, Any]], multiple: int):
        self._stream, self._multiple = stream, multiple

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        first: list[Mapping[str, Any]] = []
        count = 0
        for row in self._stream:
            if count < self._multiple:
                first.append(row)
            count += 1
            yield row
        for number in range(-count % self._multiple):
            yield {**first[number % len(first)], "repeated": True}

    def set_epoch(self, epoch: int) -> None:
        """Hands the epoch on, for streams that shuffle."""
        if hasattr(self._stream, "set_epoch"):
            self._stream.set_epoch(epoch)


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
        scores_prompts: whether prompts are scored beside the responses, for losses that ask for it.
    """

    collators: Mapping[str, Collator | Callable[[Rows], PreferenceBatch]]
    layout: str = "padded"
    max_tokens: int | None = None
    scores_prompts: bool = False

    def __call__(self, rows: Rows) -> LoaderBatch:
        """The batch of these rows; the examples of rows that are marked `repeated` do not count."""
        collate = self.collators[self.layout]
        parts = self._cut(rows, collate)
        pieces = [collate(part) for part in parts]
        if self.scores_prompts:
            pieces = [with_scored_prompts(piece, part) for piece, part in zip(pieces, parts, strict=True)]
        new = sum(not row.get("repeated") for row in rows)
        if new < len(rows):
            for piece, counted in zip(pieces, examples_of_first_rows(pieces, new), strict=True):
                piece["counted"] = counted
        return cast(LoaderBatch, loader_batch(pieces) | sequence_sizes(rows))

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


def check_loaded(batch: Any) -> LoaderBatch:
    """The batch, which a data loader with the trainer's collator has made.

    Raises:
        ValueError: another collator has made it.
    """
    if not isinstance(batch, Mapping) or "pieces" not in batch:
        raise ValueError(
            "a data loader of your own gives batches without `pieces`: use collate_fn=trainer.data_collator, or pass "
            "your collator to the trainer as data_collator"
        )
    return cast(LoaderBatch, batch)


def sequence_sizes(rows: Rows) -> dict[str, int]:
    """The tokens of the sequences [prompt | response] of some rows, and the positions of a padded batch of them.

    Example:
        >>> sequence_sizes([{"prompt_ids": [1, 2], "response_ids": [[3], [4, 5]]}])
        {'sequence_tokens': 7, 'padded_positions': 8}
    """
    if not rows or not {"prompt_ids", "response_ids"} <= rows[0].keys():
        return {}  # rows of a user's own collator
    lengths = [len(row["prompt_ids"]) + len(ids) for row in rows for ids in row["response_ids"]]
    return {"sequence_tokens": sum(lengths), "padded_positions": len(lengths) * max(lengths)}


def loader_batch(pieces: list[PreferenceBatch]) -> LoaderBatch:
    """The batch of these pieces."""
    masks = [piece.get("attention_mask", torch.ones_like(piece["input_ids"])) for piece in pieces]
    return {
        "rows": torch.cat([piece["rows"] for piece in pieces]),
        "input_ids": torch.cat([piece["input_ids"].flatten() for piece in pieces])[None],
        "attention_mask": torch.cat([mask.flatten() for mask in masks])[None],
        "pieces": pieces,
    }
