"""Rows for losses of single responses: pairs taken apart, and mismatched responses, which KTO's baseline needs.

A pair becomes two rows, a desirable and an undesirable one, so that whatever shuffles the rows shuffles the two apart.
A mismatched response answers another prompt. It is drawn from the whole data set when the row is read, anew in every
epoch, so a micro-batch of one has it, and a row has the same one on every rank and in every split.
"""

import multiprocessing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback

from hf_prefopt.data.formats import present_optional_columns
from hf_prefopt.data.group import prompt_keys
from hf_prefopt.kinds import UNPAIRED

# Streams are shuffled where they are read, so the two rows of a pair are moved apart here, within so many rows.
STREAM_BUFFER = 1000


def unpair(dataset: Dataset | IterableDataset, features: Features, seed: int = 0) -> Dataset | IterableDataset:
    """Two rows of the unpaired kind for each prepared row, which holds one pair; rows 2n and 2n + 1 were row n.

    Args:
        dataset: prepared pairs.
        features: those of prepared unpaired rows.
        seed: of the order of a stream.

    Raises:
        ValueError: a row holds several pairs, whose responses would count more than once.
    """
    how = {"batched": True, "features": features, "remove_columns": dataset.column_names}
    if isinstance(dataset, IterableDataset):
        return dataset.map(_unpair_batch, **how).shuffle(seed=seed, buffer_size=STREAM_BUFFER)
    return dataset.map(_unpair_batch, desc="Unpairing", **how)


def _unpair_batch(columns: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    optional_columns = present_optional_columns(UNPAIRED, columns)
    names = ("prompt_ids", "response_ids", "scored_masks", "labels", "row", *optional_columns)
    out: dict[str, list[Any]] = {name: [] for name in names}
    for at, row in enumerate(columns["row"]):
        if len(columns["pairs"][at]) != 1:
            raise ValueError(f"row {row:,} holds {len(columns['pairs'][at])} pairs: unpair=True takes one pair a row")
        for side, response in enumerate(columns["pairs"][at][0]):
            out["prompt_ids"].append(columns["prompt_ids"][at])
            out["response_ids"].append([columns["response_ids"][at][response]])
            out["scored_masks"].append([columns["scored_masks"][at][response]])
            out["labels"].append([side == 0])
            out["row"].append(2 * row + side)
            for extra in optional_columns:
                out[extra].append(columns[extra][at])
    return out


class MismatchedResponses(TorchDataset):
    """A prepared data set whose rows also hold `mismatched_ids` and `mismatched_masks`, one for each response.

    A function of (seed, epoch, place of the row): never a response to the row's own prompt, every other row as likely
    as the next. It is cut to the room that `max_length` leaves.

    Raises:
        ValueError: all rows have one prompt, so there is nothing to draw.
    """

    def __init__(self, dataset: Dataset, seed: int, max_length: int | None = None):
        self.dataset, self._seed, self._max_length = dataset, seed, max_length
        keys = prompt_keys(dataset)
        # Rows by prompt: those of another prompt stand before the own ones or after them.
        self._order = np.argsort(keys, kind="stable")
        ordered = keys[self._order]
        self._first, self._behind = (np.searchsorted(ordered, keys, side=side) for side in ("left", "right"))
        if len(dataset) and int(keys.max()) == 0:
            raise ValueError(
                f"all {len(dataset):,} rows have the same prompt, and KTO's baseline needs responses to other prompts: "
                "give rows of at least two prompts"
            )
        # Shared memory: worker processes that outlive an epoch see the next one's number.
        self._epoch = multiprocessing.Value("q", 0)

    def set_epoch(self, epoch: int) -> None:
        """Another draw for another epoch."""
        self._epoch.value = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = [dict(row) for row in self.dataset.__getitems__(list(indices))]
        generators = [np.random.default_rng((self._seed, self.epoch, index)) for index in indices]
        draws = [
            [self._draw(index, generator) for _ in row["response_ids"]]
            for index, row, generator in zip(indices, rows, generators, strict=True)
        ]
        others = iter(self.dataset.__getitems__([other for draw in draws for other in draw]))
        for row, draw, generator in zip(rows, draws, generators, strict=True):
            drawn = [self._response(next(others), len(row["prompt_ids"]), generator) for _ in draw]
            row["mismatched_ids"], row["mismatched_masks"] = ([part[i] for part in drawn] for i in (0, 1))
        return rows

    @property
    def epoch(self) -> int:
        """The epoch whose draws these are."""
        return self._epoch.value

    def _draw(self, index: int, generator: np.random.Generator) -> int:
        """A row of another prompt."""
        first, behind = self._first[index], self._behind[index]
        place = generator.integers(len(self) - (behind - first))
        return int(self._order[place if place < first else place + behind - first])

    def _response(
        self, row: Mapping[str, Any], prompt_length: int, generator: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """One of the row's responses and what is scored of it, cut to the room behind a prompt of that length."""
        which = int(generator.integers(len(row["response_ids"])))
        room = None if self._max_length is None else max(1, self._max_length - prompt_length)
        ids, mask = row["response_ids"][which][:room], row["scored_masks"][which][:room]
        # Turns that are not scored may be all that is left.
        return ids, mask if any(mask) else [1] * len(ids)


class EpochOfMismatches(TrainerCallback):
    """Tells the training rows which epoch it is; the Trainer tells either the sampler or the data set, not both."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **_):
        """Before the epoch's first batch is read."""
        dataset = getattr(train_dataloader, "dataset", None)
        if isinstance(dataset, MismatchedResponses):
            dataset.set_epoch(int(state.epoch or 0))
