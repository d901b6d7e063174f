"""Orders of the training rows by their lengths: `train_sampling_strategy="group_by_length"` and `"batch_rebalance"`.

The length of a row is that of its prompt and all its responses, or in the layout "padded", where each response stands
behind a prompt of its own, that of its longest sequence. Both orders depend on (seed, epoch) and the lengths alone, so
they are the same on every rank, and every micro-batch has as many rows as the settings say.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

# Which order of a step's rows belongs to a strategy; see `LengthSampler`.
STRATEGIES = ("group_by_length", "batch_rebalance")


class RowLengths:
    """The tokens of each row, in either way of laying them out; read once, when a layout is first asked for.

    Args:
        rows: prepared rows.
        column: a column of theirs that holds the lengths, if it is there; else tokens are counted.
    """

    def __init__(self, rows: Dataset, column: str = "length"):
        self._rows, self._column = rows, column
        self._counted: tuple[np.ndarray, np.ndarray] | None = None

    def of_layout(self, layout: str | None) -> np.ndarray:
        """`[rows]` int64."""
        if self._counted is None:
            self._counted = self._count()
        return self._counted[layout == "padded"]

    def _count(self) -> tuple[np.ndarray, np.ndarray]:
        if self._column in self._rows.column_names:
            lengths = np.array(self._rows.with_format(None)[self._column], dtype=np.int64)
            return lengths, lengths
        rows = self._rows.select_columns(["prompt_ids", "response_ids"]).with_format(None)
        batches = (batch for batch in rows.iter(batch_size=1000))
        pairs = (pair for b in batches for pair in zip(b["prompt_ids"], b["response_ids"], strict=True))
        counted = [(len(prompt), [len(ids) for ids in responses]) for prompt, responses in pairs]
        both = [(prompt + sum(sizes), prompt + max(sizes, default=0)) for prompt, sizes in counted]
        together, longest = np.array(both, dtype=np.int64).reshape(-1, 2).T
        return together, longest


class LengthSampler(Sampler[int]):
    """Draws rows in an order by length.

    "group_by_length" puts rows of about the same length into a step, as transformers does. "batch_rebalance" draws the
    rows of a step at random and deals them out, so that the micro-batches of all ranks are equally long: by the sum of
    their tokens where nothing is padded, or in the layout "padded" by sorting, so that a micro-batch pads little, and
    the ranks' micro-batches that run at one time are alike.

    Args:
        strategy: one of `STRATEGIES`.
        lengths: of the rows. layout: gives the layout, when an epoch begins.
        rows_at_once: of a micro-batch on one rank. micro_batches: of a step, on all ranks together.
        size: the number of rows.
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
        """Change the order for another epoch; the Trainer calls this."""
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
            if len(rows) < per_step:  # the end of the epoch, whose last micro-batches are filled up or left out
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
    """Numbers in descending order in groups of equal size, so that the sums are about equal: each to the least so far.

    Args:
        lengths: `[groups · size]`.

    Returns:
        For each group the places of its numbers.
    """
    size = len(lengths) // groups
    dealt: list[list[int]] = [[] for _ in range(groups)]
    sums = [0] * groups
    for place, length in enumerate(lengths.tolist()):
        least = min((g for g in range(groups) if len(dealt[g]) < size), key=sums.__getitem__)
        dealt[least].append(place)
        sums[least] += length
    return dealt
