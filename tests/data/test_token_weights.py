"""Token weights, from the columns of a tokenized pair to the entries of a batch."""

import pytest
import torch
from datasets import Dataset

from hf_prefopt.data.layouts import PaddedCollator, SharedCollator
from hf_prefopt.data.prepare import prepare_dataset
from hf_prefopt.objective.objective import loss_inputs
from hf_prefopt.scoring.forward import install_scoring, score
from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trainers import make_trainer

ROW = {
    "prompt_ids": [7, 8, 9],
    "chosen_ids": [10, 11, 12, 13],
    "rejected_ids": [14, 15],
    "chosen_token_weights": [1, 0.5, 0.25, 2],
    "rejected_token_weights": [3, 0.0],
}


def prepared(*rows, **settings):
    return prepare_dataset(Dataset.from_list([*rows]), tiny_tokenizer(), **settings)


def test_they_reach_the_prepared_rows():
    assert prepared(ROW)[0]["token_weights"] == [[1, 0.5, 0.25, 2], [3, 0]]


def test_rows_without_them_have_no_such_column():
    assert "token_weights" not in prepared({k: v for k, v in ROW.items() if "weights" not in k}).column_names


def test_they_are_cut_with_their_tokens():
    """Three of [10, 11, 12, eos] fit: 10, 11 and the EOS stay, each with its weight."""
    eos = tiny_tokenizer().eos_token_id
    row = prepared({**ROW, "chosen_ids": [10, 11, 12, eos]}, max_length=6)[0]
    assert row["response_ids"][0] == [10, 11, eos]
    assert row["token_weights"] == [[1, 0.5, 2], [3, 0]]


def test_a_response_without_an_end_is_cut_at_its_end():
    row = prepared(ROW, max_length=5)[0]
    assert (row["response_ids"][0], row["token_weights"][0]) == ([10, 11], [1, 0.5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen_token_weights": [1.0]}, r"`chosen_token_weights` has 1 numbers for 4 tokens"),
        ({"chosen_token_weights": None}, "`chosen_token_weights` is missing"),
        ({"rejected_token_weights": [1.0, -1.0]}, "contains -1.0 at position 1"),
        ({"rejected_token_weights": [1.0, float("nan")]}, "contains nan at position 1"),
        ({"rejected_token_weights": [1.0, float("inf")]}, "contains inf at position 1"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        prepared(ROW, {**ROW, **change})


def test_weights_of_texts_are_refused():
    """The tokens of a text are not known in advance; the error says which columns to use instead."""
    row = {"prompt": "2+2?", "chosen": " 4", "rejected": " 5", "chosen_token_weights": [1.0]}
    with pytest.raises(ValueError, match=r"have no token ids: add prompt_ids"):
        prepared(row)


def test_a_loss_of_weights_refuses_rows_without_them(tmp_path):
    plain = prepared({k: v for k, v in ROW.items() if "weights" not in k})
    with pytest.raises(ValueError, match="does not fit tis_dpo: it weights tokens, but these rows have no weights"):
        make_trainer(tmp_path, loss_type="tis_dpo", train_dataset=plain)


# Two rows of one prompt: the pairs share their chosen response with different weights. Some turns are not scored.
SHARED = [
    {
        "prompt_ids": [5, 6],
        "response_ids": [[7, 8, 9], [10]],
        "scored_masks": [[1, 0, 1], [1]],
        "token_weights": [[1.0, 2.0, 3.0], [4.0]],
        "pairs": [[0, 1]],
        "row": 3,
    },
    {
        "prompt_ids": [5, 6],
        "response_ids": [[7, 8, 9], [11, 12, 13]],
        "scored_masks": [[1, 0, 1], [1, 1, 1]],
        "token_weights": [[5.0, 6.0, 7.0], [8.0, 9.0, 10.0]],
        "pairs": [[0, 1]],
        "row": 4,
    },
]


@pytest.mark.parametrize("collate", [PaddedCollator(0), SharedCollator()])
def test_a_response_of_several_pairs_has_the_weights_of_each(collate):
    """The chosen response is computed once. Each pair keeps its weights for the scored tokens."""
    batch = collate(SHARED)
    assert batch["chosen"].tolist() == [0, 0]
    assert batch["chosen_token_weights"].tolist() == [[1, 3, 0], [5, 7, 0]]
    assert batch["rejected_token_weights"].tolist() == [[4, 0, 0], [8, 9, 10]]


def test_token_inputs_stand_beside_their_weights():
    """Token log-probs have one row per response, padded with zeros to the width of weights and masks.

    The sums of the token log-probs are the log-probs of the responses.
    """
    model, batch = tiny_model(dtype=torch.float64), PaddedCollator(0)(SHARED)
    install_scoring(model)
    scores = score(model, batch)
    names = [f"policy_{side}_{what}" for side in ("chosen", "rejected") for what in ("logps", "token_logps")]
    names += [f"{side}_token_{what}" for side in ("chosen", "rejected") for what in ("mask", "weights")]
    inputs = loss_inputs(names, batch, scores, None)
    first, second = scores.token_logps[:2], scores.token_logps[2:3]
    assert inputs["policy_chosen_token_logps"].tolist() == [[*first.tolist(), 0]] * 2
    assert inputs["policy_rejected_token_logps"][0].tolist() == [*second.tolist(), 0, 0]
    assert inputs["chosen_token_mask"].tolist() == [[True, True, False]] * 2
    for side in ("chosen", "rejected"):
        assert inputs[f"{side}_token_weights"].shape == inputs[f"policy_{side}_token_logps"].shape
        torch.testing.assert_close(inputs[f"policy_{side}_token_logps"].sum(1), inputs[f"policy_{side}_logps"])
