"""Collate the rows from the data loader into a batch, in the layout of the run.

`per_device_train_batch_size` is the number of rows that a rank draws for a batch, with or without a token budget. With
a token budget (`max_tokens_per_batch`), the rows of a batch are split, in order, into pieces: smaller batches of at
most that many token positions, which are computed one after another. In this way, the budget bounds peak memory.

If there are not enough rows for the last batch of every rank, accelerate repeats earlier rows, so that all ranks run
the same number of batches. The repeated rows are computed, but their examples are excluded from the loss. For a
dataset, the length of the dataset shows which rows are repeated. A stream has no length, so `EvenStream` repeats rows
itself and marks them.
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
    """Return how many rows of a rank's last batch are not repetitions of earlier rows.

    Args:
        rows: Number of rows in the dataset.
        share: Number of rows per batch on one rank.
        rank: Index of the rank.
        world_size: Number of ranks.

    Example:
        >>> [rows_that_count(7, 2, rank, 2) for rank in (0, 1)]  # rows 4, 5 and rows 6, 0
        [2, 1]
    """
    last = rows % (share * world_size) or share * world_size
    return min(max(last - rank * share, 0), share)


def examples_of_first_rows(pieces: list[PreferenceBatch], count: int) -> list[Tensor]:
    """Return a mask for each piece of a batch: `[B]` bool, True for examples of the batch's first `count` rows."""
    # `pair_in_row` is 0 only for the first example of a row. The cumulative sum of this condition is therefore the
    # number of each example's row, counted from 1 in the batch.
    lengths = [len(piece["rows"]) for piece in pieces]
    row = (torch.cat([piece["pair_in_row"] for piece in pieces]) == 0).cumsum(0)
    return list((row <= count).split(lengths))


def keep_examples(batch: PreferenceBatch, kept: Tensor | slice) -> PreferenceBatch:
    """Return the batch with only some of its examples, and with all of its sequences.

    The forward pass therefore stays the same. A batch without examples has no effect on the gradients. It is needed
    because the ranks of a sharded model must run the layers together: a rank that has no examples left runs such a
    batch.

    Args:
        batch: The batch, with B examples.
        kept: The examples to keep, as a slice or as `[B]` bool.
    """
    entries = cast(dict[str, Any], batch)
    names = [name for name in (*EXAMPLE_ENTRIES, "counted") if name in entries]
    return cast(PreferenceBatch, {**entries, **{name: entries[name][kept] for name in names}})


class EvenStream(IterableDataset):
    """A stream whose rows fill a whole number of batches.

    By default, its first rows are repeated at the end, with `repeated` set to True, until the last batch is full.

    Args:
        stream: The rows, which are mappings.
        multiple: Number of rows per batch, summed over all ranks. The stream is padded to a multiple of this number.
        drops_last: If True, no row is repeated. Rows at the end that do not fill a batch of `multiple` rows are dropped
            instead.
    """

    def __init__(self, stream: Iterable[Mapping[str, Any]], multiple: int, drops_last: bool = False):
        self._stream, self._multiple, self._drops_last = stream, multiple, drops_last

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return self._full_batches() if self._drops_last else self._padded()

    def _full_batches(self) -> Iterator[Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = []
        for row in self._stream:
            rows.append(row)
            if len(rows) == self._multiple:
                yield from rows
                rows = []

    def _padded(self) -> Iterator[Mapping[str, Any]]:
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
        """Pass the epoch to the stream, which may shuffle by epoch."""
        if hasattr(self._stream, "set_epoch"):
            self._stream.set_epoch(epoch)


Rows = Sequence[Mapping[str, Any]]


class Collator(Protocol):
    """Interface of a collator, which makes batches in one layout."""

    def count_tokens(self, rows: Rows) -> int:
        """Return the number of positions in the batch of these rows."""

    def __call__(self, rows: Rows) -> PreferenceBatch:
        """Return the batch of these rows."""


@dataclass
class LoaderCollator:
    """Collator that calls the collator of the current layout.

    Attributes:
        collators: Maps the name of each layout to its collator. If `max_tokens` is set, the collator must have the
            method `count_tokens`.
        layout: Name of the layout in use. It may be changed after the data loaders are created.
        max_tokens: Maximum number of positions in a piece. A row with more positions is a piece by itself. If None, all
            rows are one piece.
        scores_prompts: Whether the log-probs of prompts are computed in addition to those of responses, for losses that
            read them.
    """

    collators: Mapping[str, Collator | Callable[[Rows], PreferenceBatch]]
    layout: str = "padded"
    max_tokens: int | None = None
    scores_prompts: bool = False

    @property
    def is_custom(self) -> bool:
        """True if the collator of the current layout is a user's own collator."""
        return isinstance(self.collators[self.layout], CustomCollator)

    def __call__(self, rows: Rows) -> LoaderBatch:
        """Return the batch of these rows. Examples of rows that are marked `repeated` are excluded from the loss."""
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
        """Split the rows into pieces, each as long as the budget allows and at least one row long."""
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


@dataclass
class CustomCollator:
    """A user's own collator. If it fails, the error names the columns that it got and the type that it must return.

    Raises:
        ValueError: When called, if the collator fails or returns something other than a `PreferenceBatch`.
    """

    collate: Callable[[Rows], PreferenceBatch]

    def __call__(self, rows: Rows) -> PreferenceBatch:
        """Return the batch of these rows."""
        cure = (
            "remove it, because the trainer has its own collators, or pass a function that converts these rows to a "
            "hf_prefopt.batch.PreferenceBatch"
        )
        columns = ", ".join(rows[0])
        try:
            batch = self.collate(rows)
        except Exception as error:
            raise ValueError(
                f"data_collator={self._name} failed on prepared rows with the columns {columns} "
                f"({type(error).__name__}: {error}): {cure}"
            ) from error
        needed = ("input_ids", "scored_rows", "targets", "response_index", "response_lengths", "rows")
        missing = [name for name in needed if not isinstance(batch, Mapping) or name not in batch]
        if missing:
            raise ValueError(
                f"data_collator={self._name} returned a batch without {', '.join(missing)} for prepared rows with the "
                f"columns {columns}: {cure}"
            )
        return batch

    @property
    def _name(self) -> str:
        return getattr(self.collate, "__name__", type(self.collate).__name__)


def check_loaded(batch: Any) -> LoaderBatch:
    """Return the batch, after checking that the trainer's collator made it.

    Raises:
        ValueError: If another collator made the batch.
    """
    if not isinstance(batch, Mapping) or "pieces" not in batch:
        raise ValueError(
            "the data loader returned batches without `pieces`: create it with collate_fn=trainer.data_collator, or "
            "pass your collator to the trainer as data_collator"
        )
    return cast(LoaderBatch, batch)


def sequence_sizes(rows: Rows) -> dict[str, int]:
    """Count the tokens of all sequences [prompt | response] of these rows, and the positions after padding.

    Each sequence is padded to the longest one. Mismatched responses (see `data.unpaired`) are also scored, so the
    sequences of a row's prompt with its mismatched responses are counted, too.

    Example:
        >>> sequence_sizes([{"prompt_ids": [1, 2], "response_ids": [[3], [4, 5]]}])
        {'sequence_tokens': 7, 'padded_positions': 8}
    """
    if not rows or not {"prompt_ids", "response_ids"} <= rows[0].keys():
        return {}  # only a user's collator accepts such rows
    responses = [(row, ids) for row in rows for ids in (*row["response_ids"], *row.get("mismatched_ids", ()))]
    lengths = [len(row["prompt_ids"]) + len(ids) for row, ids in responses]
    return {"sequence_tokens": sum(lengths), "padded_positions": len(lengths) * max(lengths)}


def loader_batch(pieces: list[PreferenceBatch]) -> LoaderBatch:
    """Return the batch of a data loader that consists of these pieces.

    Its `rows`, `[examples]`, join those of the pieces. Its `input_ids` and `attention_mask`, `[1, positions]`, join
    those of the pieces as one row. The mask is 1 for all positions of a piece that has no mask.
    """
    masks = [piece.get("attention_mask", torch.ones_like(piece["input_ids"])) for piece in pieces]
    return {
        "rows": torch.cat([piece["rows"] for piece in pieces]),
        "input_ids": torch.cat([piece["input_ids"].flatten() for piece in pieces])[None],
        "attention_mask": torch.cat([mask.flatten() for mask in masks])[None],
        "pieces": pieces,
    }
