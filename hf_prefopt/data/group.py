"""Merge rows with the same prompt into one group, which contains the prompt once and each distinct response once.

Preference data often has several pairs for the same prompt, and the same response in several of these pairs. If such
pairs are in the same micro-batch, each distinct response is computed only once. A packed row (the layouts "around" and
"shared") also contains the prompt only once. `PromptSampler` orders the rows so that rows with the same prompt usually
are in the same micro-batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler

from hf_prefopt.kinds import kind_of_columns


@dataclass
class Group:
    """A prompt and its distinct responses, in the order in which the rows contain them.

    Attributes:
        prompt_ids: Token ids of the prompt.
        responses: Maps each distinct response, as (token ids, scored mask), to its index in this group. The mask is 1
            for the tokens that are scored.
    """

    prompt_ids: Sequence[int]
    responses: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = field(default_factory=dict)

    def place(self, ids: Sequence[int], mask: Sequence[int]) -> int:
        """Add a response to this group if it is new, and return its index in the group."""
        return self.responses.setdefault((tuple(ids), tuple(mask)), len(self.responses))

    @property
    def tokens(self) -> int:
        """The number of tokens of the prompt and all responses."""
        return len(self.prompt_ids) + sum(len(ids) for ids, _ in self.responses)


@dataclass
class Grouped:
    """Rows merged by prompt.

    Attributes:
        groups: The groups, ordered by their first rows.
        places: One array for each row: the indices of its responses, followed by those of its mismatched responses (see
            `data.unpaired`). They count the distinct responses of all groups, one group after another.
    """

    groups: list[Group]
    places: list[np.ndarray]


def group_rows(rows: Sequence[Mapping[str, Any]]) -> Grouped:
    """Merge rows that have the same prompt, and equal responses to the same prompt."""
    groups: dict[tuple[int, ...], Group] = {}
    numbered = []
    for row in rows:
        group = groups.setdefault(tuple(row["prompt_ids"]), Group(row["prompt_ids"]))
        ids = [*row["response_ids"], *row.get("mismatched_ids", ())]
        masks = [*row["scored_masks"], *row.get("mismatched_masks", ())]
        responses = zip(ids, masks, strict=True)
        numbered.append((group, [group.place(ids, mask) for ids, mask in responses]))
    first, total = {}, 0
    for group in groups.values():
        first[id(group)] = total
        total += len(group.responses)
    return Grouped(list(groups.values()), [np.array(numbers) + first[id(group)] for group, numbers in numbered])


def index_examples(rows: Sequence[Mapping[str, Any]], places: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Return the entries of the batch that describe its examples, such as the index of each pair's chosen response.

    The examples are in the order of the rows. `ExampleKind.index` defines the entries.

    Args:
        rows: Prepared rows.
        places: The indices of each row's responses; see `Grouped`.

    Raises:
        ValueError: If the rows are not prepared.
    """
    kind = kind_of_columns(rows[0])
    if kind is None:
        raise ValueError(f"columns {', '.join(rows[0])} are not those of prepared rows: use prepare_dataset")
    return kind.index(rows, places)


def prompt_keys(dataset: Dataset) -> np.ndarray:
    """Return `[rows]` int64: a number for each row. Two rows have the same number if their prompts are equal."""
    numbers: dict[tuple[int, ...], int] = {}
    prompts = dataset.select_columns(["prompt_ids"]).with_format(None).iter(batch_size=1000)
    keys = [numbers.setdefault(tuple(ids), len(numbers)) for batch in prompts for ids in batch["prompt_ids"]]
    return np.array(keys, dtype=np.int64)


class PromptSampler(Sampler[int]):
    """Sampler that draws the prompts in random order and yields all rows of a prompt one after another.

    Rows with the same prompt are then usually in the same batch, where they are merged into one group. For a given
    dataset, the order depends only on the seed and the epoch, so it is the same on every rank.
    """

    def __init__(self, prompt_keys: np.ndarray, seed: int):
        """Group the rows by prompt.

        Args:
            prompt_keys: `[rows]` int64. One number for each row, equal for rows with the same prompt.
            seed: Seed of the random order. The epoch is added to it.
        """
        order = np.argsort(prompt_keys, kind="stable")
        boundaries = np.flatnonzero(np.diff(prompt_keys[order])) + 1
        self._rows_of_prompt = np.split(order, boundaries)
        self._length, self._seed, self._epoch = len(prompt_keys), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Change the order for another epoch; the Trainer calls this method."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        for prompt in torch.randperm(len(self._rows_of_prompt), generator=generator).tolist():
            rows = self._rows_of_prompt[prompt]
            yield from rows[torch.randperm(len(rows), generator=generator).numpy()].tolist()
