"""Prepare rows for losses of single responses: split pairs into two rows, and draw KTO's mismatched responses."""

import multiprocessing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback

from hf_prefopt.data.group import prompt_keys

# Buffer size, in rows, for shuffling a stream. Shuffling separates the two rows of a pair.
STREAM_BUFFER = 1000


def unpair(dataset: Dataset | IterableDataset, features: Features) -> Dataset | IterableDataset:
    """Convert each row n, which contains one pair, to two unpaired rows.

    Row 2n has the chosen response, labeled desirable, and row 2n + 1 the rejected response, labeled undesirable. They
    are separate rows of the dataset, so shuffling separates them. A stream is shuffled here.

    Args:
        dataset: Prepared pairs.
        features: Features of the unpaired rows.

    Raises:
        ValueError: If a row contains several pairs, because shared responses would count more than once.
    """
    arguments = {
        "batched": True,
        "features": features,
        "remove_columns": dataset.column_names,
        "fn_kwargs": {"names": list(features)},
    }
    if isinstance(dataset, IterableDataset):
        return dataset.map(_unpair_batch, **arguments).shuffle(seed=0, buffer_size=STREAM_BUFFER)
    return dataset.map(_unpair_batch, desc="Unpairing", **arguments)


def _unpair_batch(columns: Mapping[str, list[Any]], names: Sequence[str]) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {name: [] for name in names}
    for at, row in enumerate(columns["row"]):
        if len(columns["pairs"][at]) != 1:
            raise ValueError(
                f"row {row:,} has {len(columns['pairs'][at])} pairs, but unpair=True needs one pair per row"
            )
        for side, response in enumerate(columns["pairs"][at][0]):
            unpaired = {name: columns[name][at] for name in names if name != "labels"} | {
                "response_ids": [columns["response_ids"][at][response]],
                "scored_masks": [columns["scored_masks"][at][response]],
                "labels": [side == 0],
                "row": 2 * row + side,
            }
            for name in names:
                out[name].append(unpaired[name])
    return out


class MismatchedResponses(TorchDataset):
    """A prepared dataset that adds a mismatched response, an answer to another prompt, to each response.

    KTO's baseline is the KL between policy and reference, estimated on mismatched responses. Each row gets them as
    `mismatched_ids` and `mismatched_masks`. The rows that they come from are drawn uniformly from all rows of the
    dataset with other prompts, so a batch of one row has them, too. They are cut to the length that `max_length` leaves
    after the prompt. The draw depends only on (seed, epoch, index of the row), so it is the same on every rank and for
    every batch size.

    Raises:
        ValueError: If all rows have the same prompt.
    """

    def __init__(self, dataset: Dataset, seed: int, max_length: int | None = None):
        self.dataset, self._seed, self._max_length = dataset, seed, max_length
        keys = prompt_keys(dataset)
        if len(dataset) and int(keys.max()) == 0:
            raise ValueError(
                f"all {len(dataset):,} rows have the same prompt, but KTO's baseline needs responses to other prompts: "
                "pass rows with at least two prompts"
            )
        # `_order` groups the rows by prompt. In it, the rows with the prompt of row i are at _first[i] to _end[i] - 1.
        self._order = np.argsort(keys, kind="stable")
        self._first, self._end = (np.searchsorted(keys[self._order], keys, side=side) for side in ("left", "right"))
        # Shared memory: worker processes that outlive an epoch must see the next epoch number.
        self._epoch = multiprocessing.Value("q", 0)

    @property
    def epoch(self) -> int:
        """The epoch for which responses are drawn."""
        return self._epoch.value

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. In each epoch, other responses are drawn."""
        self._epoch.value = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows = [dict(row) for row in self.dataset.__getitems__(list(indices))]
        generators = [np.random.default_rng((self._seed, self.epoch, index)) for index in indices]
        draws = [
            [self._draw_row(index, generator) for _ in row["response_ids"]]
            for index, row, generator in zip(indices, rows, generators, strict=True)
        ]
        others = iter(self.dataset.__getitems__([other for draw in draws for other in draw]))
        for row, draw, generator in zip(rows, draws, generators, strict=True):
            drawn = [self._draw_response(next(others), len(row["prompt_ids"]), generator) for _ in draw]
            row["mismatched_ids"], row["mismatched_masks"] = ([part[i] for part in drawn] for i in (0, 1))
        return rows

    def _draw_row(self, index: int, generator: np.random.Generator) -> int:
        """Draw a row whose prompt differs from this row's prompt."""
        first, end = self._first[index], self._end[index]
        place = generator.integers(len(self) - (end - first))
        return int(self._order[place if place < first else place + end - first])

    def _draw_response(
        self, row: Mapping[str, Any], prompt_length: int, generator: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """Draw one of the row's responses. Return its token ids and scored mask, cut to fit after the prompt."""
        which = int(generator.integers(len(row["response_ids"])))
        room = None if self._max_length is None else max(1, self._max_length - prompt_length)
        ids, mask = row["response_ids"][which][:room], row["scored_masks"][which][:room]
        # If the cut leaves no scored tokens, score all of them.
        return ids, mask if any(mask) else [1] * len(ids)


def check_mismatched_lengths(dataset: Dataset, max_length: int | None, positions: int, name: str) -> None:
    """Check that no prompt together with its mismatched response has more tokens than the model has positions.

    Any response to another prompt may be drawn (see `MismatchedResponses`), so a prompt and the response drawn for it
    may be too long together, even if no row is too long.

    Args:
        dataset: The prepared rows.
        max_length: Maximum length of prompt + mismatched response, to which the response is cut. If `None`, it is not
            cut.
        positions: Number of the model's positions: the maximum number of tokens of prompt + response.
        name: Name of the dataset in errors.

    Raises:
        ValueError: If some prompt and some response to another prompt are too long together.
    """
    if not len(dataset) or (max_length is not None and max_length <= positions):
        return
    batches = dataset.select_columns(["prompt_ids", "response_ids"]).with_format(None).iter(batch_size=1000)
    lengths = [
        (len(prompt), max(map(len, responses)))
        for batch in batches
        for prompt, responses in zip(batch["prompt_ids"], batch["response_ids"], strict=True)
    ]
    prompts, responses = np.array(lengths).T
    keys, longest = prompt_keys(dataset), int(responses.argmax())
    others = np.where(keys == keys[longest], 0, responses)  # 0 for responses to the same prompt as the longest response
    partners = np.where(keys == keys[longest], others.argmax(), longest)
    drawn = np.where(keys == keys[longest], others.max(), responses[longest])
    totals = prompts + (drawn if max_length is None else np.minimum(drawn, np.maximum(1, max_length - prompts)))
    worst = int(totals.argmax())
    if totals[worst] > positions:
        row, other = (dataset[int(place)]["row"] for place in (worst, partners[worst]))
        raise ValueError(
            f"{name}: KTO's baseline may draw a response of row {other:,} ({drawn[worst]:,} tokens) for the prompt of "
            f"row {row:,} ({prompts[worst]:,} tokens), but the model has {positions:,} positions: set "
            f"max_length={positions} (or less), which cuts such responses"
        )


class EpochOfMismatches(TrainerCallback):
    """Callback that sets the epoch of `MismatchedResponses`.

    It is needed because the Trainer sets the epoch of the sampler or of the dataset, but never of both.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **_):
        """Set the epoch before its first batch is read."""
        dataset = getattr(train_dataloader, "dataset", None)
        if isinstance(dataset, MismatchedResponses):
            dataset.set_epoch(int(state.epoch or 0))
