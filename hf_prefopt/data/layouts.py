"""Collate prepared rows to a batch, in each layout.

"padded": one right-padded sequence [prompt | response] for each response. Every causal language model supports it.
"around": the sequences of "padded", and indices that map their tokens to a packed row. The packed row has no padding
and contains each prompt once (see `scoring.around`).
"shared": one packed row without padding that contains each prompt once. Its parts are the groups (a prompt and its K
responses), [prompt | response 1 | … | response K]. The position ids of each response start at the length of its prompt.
Each response is a segment, which defines the tokens that the response attends to (see `scoring.attention`).

Shapes: R is the number of responses of all rows, which are ordered by group. T is the number of tokens of the longest
sequence ("padded", "around") or of the packed row ("shared"). S is the number of segments, one for each response. Tk is
the sum of the numbers of keys of all segments. N is the number of scored tokens, and B the number of examples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
import torch

from hf_prefopt.batch import PreferenceBatch, SegmentLengths
from hf_prefopt.data.group import Group, Grouped, group_rows, index_examples


@dataclass
class PaddedCollator:
    """Collate prepared rows (see `prepare_dataset`) into a `PreferenceBatch` of padded sequences.

    Attributes:
        pad_token_id: Token id with which sequences are padded. It may be the EOS, because masks are computed from the
            lengths of the sequences and not from this id.
        pad_to_multiple_of: The length of the padded sequences is rounded up to a multiple of this number.

    Example:
        >>> row = {"prompt_ids": [5, 6], "response_ids": [[7, 8], [9]], "scored_masks": [[1, 1], [1]],
        ...        "pairs": [[0, 1]], "row": 3}
        >>> batch = PaddedCollator(pad_token_id=0)([row])
        >>> batch["input_ids"].tolist()
        [[5, 6, 7, 8], [5, 6, 9, 0]]
        >>> batch["scored_rows"].tolist(), batch["targets"].tolist()
        ([1, 2, 5], [7, 8, 9])
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def count_tokens(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Return the number of positions in the batch of these rows, padding included."""
        groups = group_rows(rows).groups
        lengths = [len(group.prompt_ids) + len(ids) for group in groups for ids, _ in group.responses]
        return len(lengths) * self._width(max(lengths))

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        """Return the batch of these rows.

        Raises:
            ValueError: If a response has no scored token, or the first token of a sequence is scored.
        """
        return self.collate(rows, group_rows(rows))

    def collate(self, rows: Sequence[Mapping[str, Any]], grouped: Grouped) -> PreferenceBatch:
        """Return the batch of these rows. `grouped` is the result of `group_rows` for them."""
        tokens, scored, lengths = _concatenate(grouped.groups)
        width = self._width(int(lengths.max()))
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)

        input_ids = np.full((len(lengths), width), self.pad_token_id, dtype=np.int64)
        input_ids[sequence, position] = tokens
        response_index = sequence[scored]
        response_lengths = np.bincount(response_index, minlength=len(lengths))
        if (position[scored] == 0).any() or (response_lengths == 0).any():
            raise ValueError(
                "a response has no scored token, or scores the first token of its sequence, which no position predicts"
            )

        batch = {
            "input_ids": input_ids,
            "attention_mask": (np.arange(width) < lengths[:, None]).astype(np.int64),
            # Position t - 1 predicts token t. The prompt's last position predicts the first token of a response.
            "scored_rows": response_index * width + position[scored] - 1,
            "targets": tokens[scored],
            "response_index": response_index,
            "response_lengths": response_lengths,
            **index_examples(rows, grouped.places),
        }
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in batch.items()}
        return cast(PreferenceBatch, tensors | {"longest_response": int(response_lengths.max())})

    def _width(self, longest: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-longest // multiple) * multiple


def _concatenate(groups: Sequence[Group]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Concatenate the sequences [prompt | response] of all responses.

    Returns:
        The token ids, `[sum of lengths]` int64. A mask, `[sum of lengths]` bool, which is True for scored tokens. The
            lengths of the sequences, `[R]`.
    """
    tokens: list[Sequence[int]] = []
    scored: list[Sequence[int]] = []
    lengths: list[int] = []
    for group in groups:
        unscored = [0] * len(group.prompt_ids)
        for response, mask in group.responses:
            tokens += (group.prompt_ids, response)
            scored += (unscored, mask)
            lengths.append(len(group.prompt_ids) + len(response))
    total = sum(lengths)
    flat_tokens = np.fromiter(chain.from_iterable(tokens), dtype=np.int64, count=total)
    flat_scored = np.fromiter(chain.from_iterable(scored), dtype=bool, count=total)
    return flat_tokens, flat_scored, np.array(lengths)


@dataclass
class AroundCollator:
    """Collate rows like `PaddedCollator`, and add indices that relate the sequences to a packed row.

    The packed row contains each prompt once.

    Attributes:
        padded: Collator that makes the padded sequences.

    Example:
        >>> row = {"prompt_ids": [5, 6], "response_ids": [[7, 8], [9]], "scored_masks": [[1, 1], [1]],
        ...        "pairs": [[0, 1]], "row": 3}
        >>> batch = AroundCollator(PaddedCollator(pad_token_id=0))([row])
        >>> batch["input_ids"].flatten()[batch["around_places"]].tolist()
        [5, 6, 7, 8, 9]
        >>> batch["around_tokens"].tolist()
        [[0, 1, 2, 3], [0, 1, 4, 4]]
    """

    padded: PaddedCollator

    def count_tokens(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Return the number of positions in the batch of these rows, padding included.

        Padding is counted, because the layers that mix tokens (such as attention) compute the padded sequences.
        """
        return self.padded.count_tokens(rows)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        """Return the batch of these rows.

        Raises:
            ValueError: If a response has no scored token, or the first token of a sequence is scored.
        """
        grouped = group_rows(rows)
        batch = self.padded.collate(rows, grouped)
        count, width = batch["input_ids"].shape
        segments = _Segments.of(grouped.groups)
        # A padded position gets the index of the last token of its sequence. This has no effect on other positions,
        # because earlier positions do not attend to it.
        place = np.minimum(np.arange(width), segments.keys[:, None] - 1)
        tokens = segments.key_index()[place + (np.cumsum(segments.keys) - segments.keys)[:, None]]
        places = np.empty(segments.queries.sum(), dtype=np.int64)
        places[tokens.flatten()[::-1]] = np.arange(count * width)[::-1]  # reversed, so the first place remains
        batch["around_places"], batch["around_tokens"] = torch.from_numpy(places), torch.from_numpy(tokens)
        return batch


@dataclass
class SharedCollator:
    """Collate prepared rows (see `prepare_dataset`) into a `PreferenceBatch` of one packed row.

    Example:
        >>> row = {"prompt_ids": [5, 6], "response_ids": [[7, 8], [9]], "scored_masks": [[1, 1], [1]],
        ...        "pairs": [[0, 1]], "row": 3}
        >>> batch = SharedCollator()([row])
        >>> batch["input_ids"].tolist(), batch["position_ids"].tolist()
        ([[5, 6, 7, 8, 9]], [[0, 1, 2, 3, 2]])
        >>> batch["scored_rows"].tolist(), batch["targets"].tolist()
        ([1, 2, 1], [7, 8, 9])
    """

    def count_tokens(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Return the number of positions in the batch of these rows."""
        return sum(group.tokens for group in group_rows(rows).groups)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        """Return the batch of these rows.

        Raises:
            ValueError: If a response has no scored token, or the first token of a sequence is scored.
        """
        grouped = group_rows(rows)
        groups, segments = grouped.groups, _Segments.of(grouped.groups)
        prompts, lengths, response_starts = segments.prompts, segments.lengths, segments.response_starts
        tokens = [ids for group in groups for ids in (group.prompt_ids, *(ids for ids, _ in group.responses))]
        masks = [mask for group in groups for _, mask in group.responses]
        input_ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in tokens])
        scored = np.concatenate([np.asarray(mask, dtype=bool) for mask in masks])
        response_index = np.repeat(np.arange(len(lengths)), lengths)[scored]
        place = _count_up(lengths)[scored]
        response_lengths = np.bincount(response_index, minlength=len(lengths))
        if (place + prompts[response_index] == 0).any() or (response_lengths == 0).any():
            raise ValueError(
                "a response has no scored token, or scores the first token of its sequence, which no position predicts"
            )

        position = place + response_starts[response_index]
        last_of_prompt = (segments.prompt_starts + prompts - 1)[response_index]
        batch = {
            "input_ids": input_ids[None],
            "position_ids": segments.positions()[None],
            "segment_queries": _bounds(segments.queries),
            "segment_keys": _bounds(segments.keys),
            "segment_key_index": segments.key_index(),
            "scored_rows": np.where(place == 0, last_of_prompt, position - 1),
            "targets": input_ids[position],
            "response_index": response_index,
            "response_lengths": response_lengths,
            **index_examples(rows, grouped.places),
        }
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in batch.items()}
        on_cpu = {
            "segment_longest": (int(segments.queries.max()), int(segments.keys.max())),
            "segment_lengths": SegmentLengths(tuple(segments.queries.tolist()), tuple(segments.keys.tolist())),
            "longest_response": int(response_lengths.max()),
        }
        return cast(PreferenceBatch, tensors | on_cpu)


@dataclass(frozen=True)
class _Segments:
    """The places of prompts and responses in a packed row that contains each prompt once.

    Each response has one segment. All arrays are `[S]`, with one value for each response.

    Attributes:
        prompts: Length of the response's prompt.
        lengths: Length of the response.
        first: True for the first response of a group. Its segment also contains the queries of the prompt.
        queries, keys: Number of queries and number of keys of the response's segment.
        prompt_starts, response_starts: Index of the first token of the prompt and of the response in the packed row.
    """

    prompts: np.ndarray
    lengths: np.ndarray
    first: np.ndarray
    queries: np.ndarray
    keys: np.ndarray
    prompt_starts: np.ndarray
    response_starts: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "_Segments":
        counts = [len(group.responses) for group in groups]
        prompts = np.repeat([len(group.prompt_ids) for group in groups], counts)
        lengths = np.array([len(ids) for group in groups for ids, _ in group.responses])
        first = np.concatenate([np.arange(count) == 0 for count in counts])
        queries = lengths + prompts * first
        response_starts = np.cumsum(queries) - lengths
        prompt_starts = np.repeat((response_starts - prompts)[first], counts)
        return cls(prompts, lengths, first, queries, prompts + lengths, prompt_starts, response_starts)

    def positions(self) -> np.ndarray:
        """Return `[T]`: the position id of each token of the packed row, its index in its [prompt | response]."""
        return _count_up(self.queries) + np.repeat(np.where(self.first, 0, self.prompts), self.queries)

    def key_index(self) -> np.ndarray:
        """Return `[Tk]`: the index of each key in the packed row, one segment after another.

        The keys of a segment are the tokens of its prompt, followed by the tokens of its response.
        """
        inside = _count_up(self.keys)
        of_prompt = inside < np.repeat(self.prompts, self.keys)
        starts = (self.prompt_starts, self.response_starts - self.prompts)
        return inside + np.where(of_prompt, *(np.repeat(start, self.keys) for start in starts))


def _bounds(lengths: np.ndarray) -> np.ndarray:
    """Return `[S + 1]` int32: the starts of consecutive segments with these lengths, then the end of the last one."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _count_up(lengths: np.ndarray) -> np.ndarray:
    """Return the concatenation of the ranges 0, 1, …, n − 1 for each n in `lengths`."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
