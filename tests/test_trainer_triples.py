"""Triples in the trainer: from a raw row to the loss, as pairs for losses of pairs, and errors."""

import pytest
import torch
from datasets import Dataset

from hf_prefopt.data.layouts import PaddedCollator, SharedCollator
from hf_prefopt.data.prepare import prepare_dataset
from hf_prefopt.objective.objective import loss_inputs
from hf_prefopt.reporting.preview import preview_rows
from hf_prefopt.scoring.forward import install_scoring, score
from tests.data.helpers import chat_pair, reply, text_pair
from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trainers import first_batch, logged, make_trainer, pairs, triples

TOKENIZER = tiny_tokenizer()
RAW = [
    {**text_pair(), "reference": " Paris, on the Seine."},
    {**text_pair(chosen=" Paris!", rejected=" Lyon."), "reference": " Paris"},
]
GIVEN = {"processing_class": TOKENIZER, "per_device_train_batch_size": 1}


@pytest.mark.parametrize("collate", [PaddedCollator(0), SharedCollator()])
def test_the_inputs_of_a_triple_are_those_of_its_responses(collate):
    """The log-probs of each response equal those of the same response in a pair; the
    second response of (chosen, gold) is gold.
    """
    from hf_prefopt.scoring.attention import install_segment_attention

    model, rows = tiny_model(dtype=torch.float64), [*triples(3)]
    install_scoring(model)
    install_segment_attention(model)
    names = ("policy_chosen_logps", "policy_rejected_logps", "policy_gold_logps", "gold_lengths")
    batch = collate(rows)
    found = loss_inputs(names, batch, score(model, batch), None)
    for place, name in ((1, "policy_rejected_logps"), (2, "policy_gold_logps")):
        as_pairs = [{**row, "pairs": [[0, place]]} for row in rows]
        batch = collate([{key: row[key] for key in row if key != "golds"} for row in as_pairs])
        expected = loss_inputs(names[:2], batch, score(model, batch), None)["policy_rejected_logps"]
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=0)
    assert found["gold_lengths"].tolist() == [len(row["response_ids"][2]) for row in rows]


def test_raw_triples_train(tmp_path):
    """The rows are text with a column `reference`; the NLL of the first step is that of the gold responses."""
    data = Dataset.from_list(RAW)
    trainer = make_trainer(tmp_path, tiny_model(vocab_size=600), loss_type="tpo", train_dataset=data, **GIVEN)
    assert [*trainer.train_dataset.features][-2:] == ["golds", "row"]
    row = trainer.train_dataset[0]
    assert TOKENIZER.decode(row["response_ids"][2]).startswith(" Paris, on the Seine.")
    batch = first_batch(trainer)
    model = trainer.model.eval()
    with torch.no_grad():
        scores = score(model, batch)
    expected = -(scores.logps / scores.lengths)[batch["gold"]].mean().item()
    trainer.train()
    assert logged(trainer, "loss/tpo_nll")[0] == pytest.approx(expected, rel=1e-5)
    assert logged(trainer, "logps/gold")[0] == pytest.approx(scores.logps[batch["gold"]].mean().item(), rel=1e-5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_loss_of_pairs_leaves_the_gold_response_aside(stream, tmp_path):
    """DPO prepares two responses of each row, and does not use the cached rows of a loss of triples."""
    data = Dataset.from_list(RAW)
    data = data.to_iterable_dataset() if stream else data
    model = tiny_model(vocab_size=600)
    counts = {}
    for loss in ("tpo", "dpo", "tpo_l"):
        trainer = make_trainer(tmp_path, model, loss_type=loss, train_dataset=data, max_steps=1, **GIVEN)
        counts[loss] = [len(row["response_ids"]) for row in trainer.train_dataset]
    assert counts == {"tpo": [3, 3], "dpo": [2, 2], "tpo_l": [3, 3]}


def test_prepared_triples_fit_losses_of_pairs(tmp_path):
    """Prepared triples contain the pairs: the evaluation equals that of the pairs alone."""
    rows = triples(4)
    trainer = make_trainer(tmp_path, tiny_model(), loss_type="simpo", train_dataset=rows)
    as_pairs = rows.remove_columns("golds").map(
        lambda row: {name: row[name][:2] for name in ("response_ids", "scored_masks")}
    )
    loss, expected = (trainer.evaluate(data)["eval_loss"] for data in (rows, as_pairs))
    assert loss == pytest.approx(expected, rel=1e-6)


def test_rows_without_a_gold_response_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"the train dataset holds pairs, but tpo needs triples: .* gold response in `reference`"
    ):
        make_trainer(tmp_path, loss_type="tpo", train_dataset=pairs(2))
    bad = Dataset.from_list([RAW[0], {**RAW[1], "reference": " "}])
    with pytest.raises(ValueError, match="row 1: `reference` is only whitespace"):
        make_trainer(tmp_path, loss_type="tpo", train_dataset=bad, **GIVEN)


def test_a_gold_response_of_messages_has_the_prompt_of_its_pair():
    from hf_prefopt.kinds import TRIPLES

    raw = {**chat_pair(), "reference": reply("It is Paris.")}
    row = prepare_dataset(Dataset.from_list([raw]), TOKENIZER, kind=TRIPLES)[0]
    pair = prepare_dataset(Dataset.from_list([chat_pair()]), TOKENIZER)[0]
    assert row["prompt_ids"] == pair["prompt_ids"] and row["response_ids"][:2] == pair["response_ids"]
    titles = [panel.title.plain for panel in preview_rows([row], TOKENIZER).renderables[0].renderables[1:]]
    assert [title.split(":")[0] for title in titles] == ["prompt", "chosen", "rejected", "gold"]
