"""The padded layout: every index has the meaning that batch.py documents."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_prefopt.data.layouts import PaddedCollator

PAD = 0
PAIR = {
    "prompt_ids": [5, 6],
    "response_ids": [[7, 8, 9], [10]],
    "scored_masks": [[1, 0, 1], [1]],
    "pairs": [[0, 1]],
    "row": 41,
}
# Three responses, two of them preferred to the last.
LIST = {
    "prompt_ids": [5],
    "response_ids": [[7], [8, 9], [10]],
    "scored_masks": [[1], [1, 1], [1]],
    "pairs": [[0, 2], [1, 2]],
    "row": 7,
}


def test_a_pair_by_hand():
    """T = 5. Response 0 = 5 6 |7 8 9|: the states at 1 and 3 score 7 and 9. Response 1 = 5 6 |10| pad pad: the state at
    1 of the second sequence, row 5 + 1 = 6 of the flattened states, scores 10.
    """
    batch = PaddedCollator(PAD)([PAIR])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [5, 6, 10, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["scored_rows"].tolist() == [1, 3, 6]
    assert batch["targets"].tolist() == [7, 9, 10]
    assert batch["response_index"].tolist() == [0, 0, 1]
    assert batch["response_lengths"].tolist() == [2, 1]
    assert (batch["chosen"].tolist(), batch["rejected"].tolist(), batch["rows"].tolist()) == ([0], [1], [41])


def test_every_tensor_is_int64():
    """The only entry that is not a tensor is a number, the scored tokens of the longest response: 2."""
    batch = PaddedCollator(PAD)([PAIR, LIST])
    assert batch.pop("longest_response") == 2
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_responses_come_group_by_group_and_examples_point_at_them():
    """PAIR has responses 0 and 1; LIST has 2, 3, 4, with the pairs (2, 4) and (3, 4)."""
    examples = PaddedCollator(PAD)([PAIR, LIST])
    assert examples["chosen"].tolist() == [0, 2, 3]
    assert examples["rejected"].tolist() == [1, 4, 4]
    assert examples["rows"].tolist() == [41, 7, 7]
    assert PaddedCollator(PAD)([PAIR, LIST])["input_ids"][:, 0].tolist() == [5] * 5


def test_the_width_is_rounded_up():
    assert PaddedCollator(PAD, pad_to_multiple_of=4)([PAIR])["input_ids"].shape == (2, 8)


def test_a_response_that_scores_nothing_is_refused():
    with pytest.raises(ValueError, match="has no scored token"):
        PaddedCollator(PAD)([{**PAIR, "scored_masks": [[1, 1, 1], [0]]}])


def test_scoring_the_first_token_of_a_sequence_is_refused():
    with pytest.raises(ValueError, match="which nothing predicts"):
        PaddedCollator(PAD)([{**PAIR, "prompt_ids": []}])


def test_pad_being_a_scored_token_changes_nothing():
    """With 9 as the pad token, the 9 that ends response 0 is still attended to and scored."""
    batch = PaddedCollator(pad_token_id=9)([PAIR])
    assert batch["attention_mask"].sum().item() == 8 and 9 in batch["targets"].tolist()


def test_scored_rows_pick_the_log_probs_of_separate_forwards():
    """The log-prob of each scored token in the padded batch equals that of its sequence alone, without padding."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, initializer_range=0.3, **sizes)).eval()
    batch = PaddedCollator(PAD)([PAIR, LIST])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logps = model(**inputs).logits.flatten(0, 1).log_softmax(-1)[batch["scored_rows"], batch["targets"]]
        expected = []
        for row in (PAIR, LIST):
            for ids, mask in zip(row["response_ids"], row["scored_masks"], strict=True):
                sequence = torch.tensor(row["prompt_ids"] + ids)
                alone = model(input_ids=sequence[None]).logits[0].log_softmax(-1)
                start = len(row["prompt_ids"])
                expected += [alone[start + at - 1, ids[at]] for at in range(len(ids)) if mask[at]]
    torch.testing.assert_close(logps, torch.stack(expected))
