"""Merge rows with the same prompt into one group: the prompt once, and each distinct response once.

Preference data often has several pairs for the same prompt, and the same response in several of these pairs. Rows with
the same prompt in one micro-batch are computed together; `PromptSampler` puts them into the same batch.
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
    """A prompt and its distinct responses, in the order of the rows.

    Attributes:
        prompt_ids: Token ids of the prompt.
        responses: Map from (token ids, scored mask) to the index of the response in this group.
    """

    prompt_ids: Sequence[int]
    responses: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = field(default_factory=dict)

    def place(self, ids: Sequence[int], mask: Sequence[int]) -> int:
        """Return the index of a response in this group, after adding the response if it is new."""
        return self.responses.setdefault((tuple(ids), tuple(mask)), len(self.responses))

    @property
    def tokens(self) -> int:
        """The number of tokens of the prompt and all responses."""
        return len(self.prompt_ids) + sum(len(ids) for ids, _ in self.responses)


@dataclass
class Grouped:
    """Rows merged by prompt.

    Attributes:
        groups: The groups, in the order of their first rows.
        places: For each row, the indices of its responses and then of its mismatched responses, in the concatenated
            responses of all groups.
    """

    groups: list[Group]
    places: list[np.ndarray]


def group_rows(rows: Sequence[Mapping[str, Any]]) -> Grouped:
    """Merge rows with the same prompt, and equal responses to this prompt."""
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
    """Index the examples of all rows, in the order of the rows, as entries of the batch; see `ExampleKind.index`.

    Args:
        rows: Prepared rows.
        places: See `Grouped`.

    Raises:
        ValueError: If the rows are not prepared.
    """
    kind = kind_of_columns(rows[0])
    if kind is None:
        raise ValueError(f"columns {', '.join(rows[0])} are not those of prepared rows: use prepare_dataset")
    return kind.index(rows, places)


def prompt_keys(dataset: Dataset) -> np.ndarray:
    """Return `[rows]` int64: a number for each row's prompt, equal for equal prompts."""
    numbers: dict[tuple[int, ...], int] = {}
    prompts = dataset.select_columns(["prompt_ids"]).with_format(None).iter(batch_size=1000)
    keys = [numbers.setdefault(tuple(ids), len(numbers)) for batch in prompts for ids in batch["prompt_ids"]]
    return np.array(keys, dtype=np.int64)


class PromptSampler(Sampler[int]):
    """Sampler that draws prompts in random order, with all rows of a prompt next to each other.

    Rows with the same prompt are then usually in the same batch, where the prompt is computed once. The order depends
    only on (seed, epoch), so it is the same on every rank.
    """

    def __init__(self, prompt_keys: np.ndarray, seed: int):
        """Group the rows by `prompt_keys`, `[rows]`, which are equal for rows with the same prompt."""
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
