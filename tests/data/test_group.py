"""Rows with the same prompt come together: in a group, in the sampler's order, and in pieces under a token budget."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import find_batch_size

from hf_prefopt.data.collator import LoaderCollator, keep_examples
from hf_prefopt.data.group import PromptSampler, group_rows, prompt_keys
from hf_prefopt.data.layouts import PaddedCollator, SharedCollator


def pair(row, prompt, chosen, rejected):
    return {
        "prompt_ids": prompt,
        "response_ids": [chosen, rejected],
        "scored_masks": [[1] * len(chosen), [1] * len(rejected)],
        "pairs": [[0, 1]],
        "row": row,
    }


# Rows 0 and 2 share a prompt and a chosen response; row 1 is between them.
A, B = [5, 6, 7], [8, 9]
ROWS = [pair(0, A, [10, 2], [11, 2]), pair(1, B, [12, 2], [13, 13, 2]), pair(2, A, [10, 2], [14, 2])]


def test_a_prompt_and_a_response_are_computed_once():
    """Group A: prompt 3 + responses of 2, 2 and 2 tokens = 9; B: 2 + 2 + 3 = 7. Row 2 has A's responses 0 and 2."""
    grouped = group_rows(ROWS)
    assert [group.tokens for group in grouped.groups] == [9, 7]
    assert [places.tolist() for places in grouped.places] == [[0, 1], [3, 4], [0, 2]]
    assert SharedCollator()(ROWS)["input_ids"].shape == (1, 16)
    assert SharedCollator().count_tokens(ROWS) == 16
    # Padded: five sequences with at most 3 + 2 or 2 + 3 tokens.
    assert PaddedCollator(0)(ROWS)["input_ids"].shape == (5, 5)
    assert PaddedCollator(0).count_tokens(ROWS) == 25


@pytest.mark.parametrize("collate", [SharedCollator(), PaddedCollator(0)])
def test_examples_keep_the_order_of_their_rows(collate):
    batch = collate(ROWS)
    assert batch["rows"].tolist() == [0, 1, 2]
    assert batch["chosen"].tolist() == [0, 3, 0]
    assert batch["rejected"].tolist() == [1, 4, 2]


def test_the_same_tokens_scored_otherwise_are_another_response():
    other = ROWS[0] | {"scored_masks": [[0, 1], [1, 1]], "row": 3}
    assert len(group_rows([ROWS[0], other]).groups[0].responses) == 3


def test_a_shared_row_by_hand():
    """[5 6 7 | 10 2 | 11 2]: the second response is at 5 and 6 with position ids 3
    and 4, and attends to 0, 1, 2, 5, 6.
    """
    batch = SharedCollator()(ROWS[:1])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 10, 2, 11, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4]]
    assert batch["segment_queries"].tolist() == [0, 5, 7]
    assert batch["segment_keys"].tolist() == [0, 5, 10]
    assert batch["segment_key_index"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6]
    assert batch["segment_longest"] == (5, 5)
    # The last prompt state predicts each first token, and the first token's state predicts each second token.
    assert batch["scored_rows"].tolist() == [2, 3, 2, 5]
    assert batch["targets"].tolist() == [10, 2, 11, 2]
    assert batch["response_index"].tolist() == [0, 0, 1, 1]


class TestPromptSampler:
    keys = np.array([4, 7, 4, 4, 7, 1])

    def test_gives_every_row_once_with_its_prompts_others_beside_it(self):
        order = list(PromptSampler(self.keys, seed=0))
        assert sorted(order) == list(range(6))
        prompts = self.keys[order]
        assert (np.diff(prompts) != 0).sum() == 2  # three prompts, so two changes

    def test_is_a_function_of_seed_and_epoch(self):
        sampler = PromptSampler(self.keys, seed=0)
        first = list(sampler)
        assert list(sampler) == first == list(PromptSampler(self.keys, seed=0))
        sampler.set_epoch(1)
        assert list(sampler) != first
        assert list(sampler) == list(PromptSampler(self.keys, seed=1))

    def test_keys_tell_prompts_apart(self):
        assert prompt_keys(Dataset.from_list(ROWS)).tolist() == [0, 1, 0]


class TestTokenBudget:
    def collate(self, max_tokens):
        return LoaderCollator({"shared": SharedCollator()}, "shared", max_tokens)(ROWS)

    @pytest.mark.parametrize(
        ("budget", "rows"),
        [
            (16, [[0, 1, 2]]),  # all three rows: 16 tokens with the shared prompt
            (15, [[0, 1], [2]]),  # 7 + 7 = 14, then 7
            (13, [[0], [1], [2]]),
            (1, [[0], [1], [2]]),  # a row that exceeds the budget becomes a separate piece
        ],
    )
    def test_pieces_stay_below_it(self, budget, rows):
        assert [piece["rows"].tolist() for piece in self.collate(budget)["pieces"]] == rows

    def test_without_one_there_is_one_micro_batch(self):
        (piece,) = self.collate(None)["pieces"]
        assert piece["rows"].tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        ("layout", "max_tokens", "positions", "tokens"),
        [
            ("shared", None, 16, 16),
            ("shared", 15, 14 + 7, 14 + 7),
            ("padded", None, 25, 3 * 5 + 4 + 5),  # the prompt B with a response of two tokens is padded by one token
            ("padded", 15, 3 * 10, 10 + 4 + 5 + 10),  # one row at a time
        ],
    )
    def test_what_the_trainer_counts_is_of_all_pieces(self, layout, max_tokens, positions, tokens):
        """The counts of examples and tokens that the Trainer reads are those of all pieces together."""
        collators = {"shared": SharedCollator(), "padded": PaddedCollator(0)}
        batch = LoaderCollator(collators, layout, max_tokens)(ROWS)
        assert find_batch_size(batch) == 3
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (1, positions)
        assert batch["attention_mask"].sum() == tokens

    def test_an_idle_piece_has_the_tokens_and_no_examples(self):
        (batch,) = self.collate(None)["pieces"]
        idle = keep_examples(batch, torch.zeros_like(batch["rows"], dtype=torch.bool))
        assert idle["input_ids"] is batch["input_ids"]
        assert [len(idle[name]) for name in ("chosen", "rejected", "rows")] == [0, 0, 0]
