"""Order the training rows by length, for `train_sampling_strategy="group_by_length"` and `"batch_rebalance"`.

The length of a row is the number of tokens in its prompt and all of its responses. The layout "padded" is an exception,
because each response there follows its own copy of the prompt: the length of a row is then the length of its longest
sequence [prompt | response]. Both orders depend only on the seed, the epoch and the lengths, so they are the same on
every rank. They do not change the number of rows per micro-batch.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

# The names of the two orders, which `LengthSampler` describes.
STRATEGIES = ("group_by_length", "batch_rebalance")


class RowLengths:
    """The length of each row: one number for the layout "padded", and one for all other layouts.

    The lengths are computed at the first use and then stored.

    Args:
        rows: Prepared rows.
        column: Name of a column that gives the length of each row, for every layout. If `rows` has no such column, the
            tokens are counted.
    """

    def __init__(self, rows: Dataset, column: str = "length"):
        self._rows, self._column = rows, column
        self._counted: tuple[np.ndarray, np.ndarray] | None = None

    def of_layout(self, layout: str | None) -> np.ndarray:
        """Return `[rows]` int64: the length of each row in this layout.

        Raises:
            ValueError: If the column has a value that is not a number of tokens.
        """
        if self._counted is None:
            self._counted = self._count()
        return self._counted[layout == "padded"]

    def _count(self) -> tuple[np.ndarray, np.ndarray]:
        if self._column in self._rows.column_names:
            lengths = _checked(self._rows.with_format(None)[self._column], self._column)
            return lengths, lengths
        rows = self._rows.select_columns(["prompt_ids", "response_ids"]).with_format(None)
        batches = (batch for batch in rows.iter(batch_size=1000))
        pairs = (pair for b in batches for pair in zip(b["prompt_ids"], b["response_ids"], strict=True))
        counted = [(len(prompt), [len(ids) for ids in responses]) for prompt, responses in pairs]
        both = [(prompt + sum(sizes), prompt + max(sizes, default=0)) for prompt, sizes in counted]
        together, longest = np.array(both, dtype=np.int64).reshape(-1, 2).T
        return together, longest


def _checked(values: Iterable[Any], column: str) -> np.ndarray:
    for row, value in enumerate(values := list(values)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise ValueError(
                f"length_column_name={column!r}: row {row} has {value!r}, which is not a number of tokens: correct the "
                "column, or remove it, and the tokens are counted"
            )
    return np.array(values, dtype=np.int64)


class LengthSampler(Sampler[int]):
    """Sampler that orders rows by length.

    "group_by_length" puts rows of similar length into the same step, with the function that transformers uses.

    "batch_rebalance" draws the rows of each step at random, and then distributes them over the micro-batches of the
    step. In the layout "padded", it sorts the rows by length. So micro-batches contain little padding, and the
    micro-batches that the ranks run at the same time have similar lengths. In all other layouts, it gives the
    micro-batches similar total numbers of tokens.

    Args:
        strategy: One of `STRATEGIES`.
        lengths: Lengths of the rows.
        layout: Function that returns the name of the layout. It is called at the start of each epoch.
        rows_at_once: Number of rows per micro-batch on one rank.
        micro_batches: Number of micro-batches per step, summed over all ranks.
        seed: Seed of the random order. The epoch is added to it.
        size: Total number of rows.
    """

    def __init__(
        self,
        strategy: str,
        lengths: RowLengths,
        layout: Callable[[], str | None],
        rows_at_once: int,
        micro_batches: int,
        seed: int,
        size: int,
    ):
        self._order = {"group_by_length": self._grouped, "batch_rebalance": self._balanced}[strategy]
        self._lengths, self._layout, self._rows_at_once = lengths, layout, rows_at_once
        self._micro_batches, self._seed, self._size = micro_batches, seed, size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Change the order for another epoch; the Trainer calls this method."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        layout = self._layout()
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        return self._order(self._lengths.of_layout(layout), layout == "padded", generator)

    def _grouped(self, lengths: np.ndarray, is_padded: bool, generator: torch.Generator) -> Iterator[int]:
        rows = self._rows_at_once * self._micro_batches
        yield from get_length_grouped_indices(lengths.tolist(), rows, generator=generator)

    def _balanced(self, lengths: np.ndarray, is_padded: bool, generator: torch.Generator) -> Iterator[int]:
        order = torch.randperm(len(lengths), generator=generator).numpy()
        per_step = self._rows_at_once * self._micro_batches
        for start in range(0, len(order), per_step):
            rows = order[start : start + per_step]
            if len(rows) < per_step:  # the last step may be incomplete; its rows keep their random order
                yield from rows.tolist()
                continue
            longest_first = rows[np.argsort(-lengths[rows], kind="stable")]
            if is_padded:
                yield from longest_first.tolist()
                continue
            groups = deal(lengths[longest_first], self._micro_batches)
            groups.sort(key=lambda group: -lengths[longest_first[group]].sum())
            for group in groups:
                yield from longest_first[group].tolist()


def deal(lengths: np.ndarray, groups: int) -> list[list[int]]:
    """Distribute lengths over groups, so that all groups have the same size and similar sums.

    Each length goes to the group with the smallest sum among the groups that are not full.

    Args:
        lengths: `[groups · size]`, where size is the number of lengths per group. In descending order.
        groups: Number of groups.

    Returns:
        For each group, the indices of its lengths in `lengths`.
    """
    size = len(lengths) // groups
    dealt: list[list[int]] = [[] for _ in range(groups)]
    sums = [0] * groups
    for place, length in enumerate(lengths.tolist()):
        least = min((g for g in range(groups) if len(dealt[g]) < size), key=sums.__getitem__)
        dealt[least].append(place)
        sums[least] += length
    return dealt
