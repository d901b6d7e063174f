"""Rows that a data loader repeats, so that all ranks have a batch as long as the others: their examples do not count.

Where the rows do not fill the last batches of all ranks, accelerate goes on with the first rows. Training would take
them a second time in an epoch, and evaluation would count them twice. They are computed, for ranks work in step, and
their examples are left out.

Of a data set it is known by its length which rows those are. A stream is filled up here, by rows that say so.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from hf_prefopt.batch import PreferenceBatch
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


def keep_examples(batch: PreferenceBatch, kept: Tensor) -> PreferenceBatch:
    """The batch with some of its examples `[B]` bool; it runs as long as before.

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
