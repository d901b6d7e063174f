"""Unpaired rows and lists in the trainer: order, mismatched responses, resuming, metrics, reports."""

import functools
import itertools
import logging
import math
import re
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console

from hf_prefopt import Mixture, Source
from hf_prefopt.recording import record_run
from hf_prefopt.reporting.plots import plot_training
from hf_prefopt.reporting.report_page import report_page
from hf_prefopt.reporting.results import results_of
from hf_prefopt.reporting.table import evaluation_table
from tests.data.helpers import real_rows, reply
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.tokenizers import tiny_tokenizer
from tests.trainers import lists as list_rows
from tests.trainers import logged, make_trainer, pairs, unpaired, weights

UNPAIRED_LOSSES = ["kto", "bco", "apo_zero_unpaired", "npo"]


def away(**config):
    """Return settings with a policy and a reference that differ by some nats."""
    return {"model": perturbed(tiny_model(**config), scale=0.05), "ref_model": tiny_model(**config)}


def train_batches(trainer, epoch=0):
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    return [piece for batch in loader for piece in trainer._prepare_inputs(batch)["pieces"]]


def response_tokens(batch, which):
    """Return the scored tokens of the responses to which an entry of the batch points, as a tuple for each response."""
    return [tuple(batch["targets"][batch["response_index"] == response].tolist()) for response in batch[which].tolist()]


def test_unpaired_pairs_are_shuffled(tmp_path):
    """In micro-batches of four of 32 pairs, the labels are mixed: desirable rows are not all first, and the two
    responses of a pair are not adjacent. The next epoch has another order.
    """
    trainer = make_trainer(tmp_path, loss_type="bco", unpair=True, train_dataset=pairs(32))
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 4
    orders = []
    loader = trainer.get_train_dataloader()
    for epoch in range(2):
        loader.set_epoch(epoch)
        orders.append([batch["rows"].tolist() for batch in loader])
    for order in orders:
        rows = list(itertools.chain(*order))
        assert sorted(rows) == list(range(64))
        labels = [row % 2 == 0 for row in rows]
        assert 8 < sum(labels[:32]) < 24
        mixed = sum(0 < sum(row % 2 == 0 for row in batch) < 4 for batch in order)
        assert mixed > len(order) / 2
        assert sum(a // 2 == b // 2 for a, b in itertools.pairwise(rows)) < 8
    assert orders[0] != orders[1]


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_mismatched_responses_are_another_rows_behind_the_own_prompt(layout, tmp_path):
    """Each is the response of another row; in the shared layout, both responses share the prompt."""
    data = unpaired(12)
    trainer = make_trainer(tmp_path, loss_type="kto", train_dataset=data, layout=layout)
    trainer.scorer.settle()
    of_row = {row["row"]: tuple(row["response_ids"][0]) for row in data}
    for batch in train_batches(trainer):
        own, other = response_tokens(batch, "responses"), response_tokens(batch, "mismatched")
        for row, mine, theirs in zip(batch["rows"].tolist(), own, other, strict=True):
            assert mine == of_row[row] and theirs in {of_row[n] for n in of_row if n != row}
        if layout == "shared":
            prompts = sum(len(data[row]["prompt_ids"]) for row in batch["rows"].tolist())
            assert batch["input_ids"].shape == (1, prompts + sum(map(len, own + other)))


def test_mismatched_responses_are_drawn_anew_each_epoch_and_alike_for_any_split(tmp_path):
    """The draws are the same in micro-batches of 1, 2 and 8, in worker processes,
    and if the same epoch is read again.
    """

    def by_row(size, epoch, workers=0):
        settings = {"per_device_train_batch_size": size, "dataloader_num_workers": workers}
        trainer = make_trainer(tmp_path, loss_type="kto", train_dataset=unpaired(12), **settings)
        return {
            row: other
            for batch in train_batches(trainer, epoch)
            for row, other in zip(batch["rows"].tolist(), response_tokens(batch, "mismatched"), strict=True)
        }

    first = by_row(1, 0)
    assert first == by_row(2, 0) == by_row(8, 0) == by_row(4, 0, workers=1)
    assert first != by_row(1, 1)


def test_each_epoch_of_a_run_has_its_own_mismatches(tmp_path, monkeypatch):
    """The mismatched responses of the training steps differ in three epochs, also with worker processes."""
    for workers in (0, 1):
        settings = {"num_train_epochs": 3, "dataloader_num_workers": workers, "per_device_train_batch_size": 8}
        settings |= {"dataloader_persistent_workers": workers > 0}
        trainer = make_trainer(tmp_path, loss_type="kto", train_dataset=unpaired(8), **settings)
        seen, compute_loss = [], trainer.compute_loss

        def watched(model, inputs, *args, _seen=seen, _compute=compute_loss, **kwargs):
            _seen.append(dict(zip(inputs["rows"].tolist(), response_tokens(inputs, "mismatched"), strict=True)))
            return _compute(model, inputs, *args, **kwargs)

        monkeypatch.setattr(trainer, "compute_loss", watched)
        trainer.train()
        assert len(seen) == 3 and all(a != b for a, b in itertools.combinations(seen, 2))


RESUMED = {
    "kto": {"loss_type": "kto"},
    "kto, one by one": {"loss_type": "kto", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "bco": {"loss_type": "bco", "beta": 0.3},
    "bco, unpaired pairs": {"loss_type": "bco", "beta": 0.3, "unpair": True, "train_dataset": pairs(3)},
    "bco_pair": {"loss_type": "bco_pair", "beta": 0.3, "train_dataset": pairs(6)},
    "beta_dpo": {"loss_type": "beta_dpo", "train_dataset": pairs(6)},
    "dpo_shift": {"loss_type": "dpo_shift", "loss_params": {"lambda_end": 0.1}, "train_dataset": pairs(6)},
    "sampo": {"loss_type": "sampo", "beta": 1.0, "train_dataset": pairs(6)},
    "alpha_dpo, one by one": {
        "loss_type": "alpha_dpo",
        "train_dataset": pairs(6),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    },
    "plackett_luce": {"loss_type": "plackett_luce", "train_dataset": list_rows(6)},
}


@pytest.mark.parametrize("settings", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(settings, tmp_path):
    """A run that stops after step 4 of 6, in the second epoch, is bit-equal when
    resumed, including the mismatched responses of this epoch and δ.
    """
    settings = {"save_strategy": "steps", "save_steps": 2, "train_dataset": unpaired(6), **settings}
    settings["num_train_epochs"] = 2
    whole = make_trainer(tmp_path / "whole", with_lora(tiny_model(), lora_dropout=0.3), **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "again", with_lora(tiny_model(), lora_dropout=0.3), **settings)
    torch.rand(100)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == whole.state.global_step == 6
    names = {name for entry in whole.state.log_history for name in entry if "/" in name} | {"loss", "grad_norm"}
    for name in names:
        after = [entry[name] for entry in whole.state.log_history if name in entry and entry["step"] > 4]
        again = [entry[name] for entry in resumed.state.log_history if name in entry and entry["step"] > 4]
        assert again == after, name
    assert resumed.criterion.state_dict() == whole.criterion.state_dict()
    assert all(torch.equal(value, weights(whole.model)[name]) for name, value in weights(resumed.model).items())


def test_a_checkpoint_without_the_state_says_so(tmp_path, caplog):
    """The run resumes with another loss, which has no saved state."""
    settings = {"train_dataset": pairs(6), "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path, **settings).train()
    resumed = make_trainer(tmp_path, loss_type="bco_pair", **{**settings, "max_steps": 2})
    with caplog.at_level(logging.WARNING, logger="hf_prefopt"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "the checkpoint has no state for bco_pair: using the initial state" in caplog.text


ONE_CLASS = [(loss, label) for loss in UNPAIRED_LOSSES for label in (True, False)]
ONE_CLASS.remove(("npo", True))  # an error, because desirable responses have no gradient


@pytest.mark.parametrize(("loss", "label"), ONE_CLASS)
def test_data_of_one_class_trains_and_evaluates(loss, label, tmp_path):
    """The numbers are finite; metrics of the missing class are left out instead of being nan."""
    data = unpaired(4).map(lambda row: {"labels": [label]})
    trainer = make_trainer(tmp_path, **away(), loss_type=loss, train_dataset=data, eval_dataset=data)
    trainer.train()
    metrics = trainer.evaluate()
    own, other = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert f"eval_rewards/{own}" in metrics and f"eval_logps/{own}" in metrics
    assert not {f"eval_rewards/{other}", f"eval_logps/{other}", "eval_rewards/margins"} & metrics.keys()
    numbers = [*metrics.values(), *logged(trainer, "loss"), *logged(trainer, "grad_norm")]
    assert all(map(math.isfinite, numbers))


@pytest.mark.parametrize("loss", UNPAIRED_LOSSES)
def test_metrics_are_means_over_their_class(loss, tmp_path):
    """Six desirable and three undesirable rows are in batches of two, some with only one class. The metrics of each
    class are means over its rows evaluated alone, and the margin is their difference.
    """
    data = unpaired(9)
    trainer = make_trainer(tmp_path, **away(), loss_type=loss, train_dataset=data)
    trainer.criterion.update_state(
        {name: torch.zeros(2, dtype=torch.bool if name == "labels" else None) for name in trainer.criterion.inputs}
    )
    together = trainer.evaluate(data)
    for side, label in (("chosen", True), ("rejected", False)):
        alone = trainer.evaluate(data.filter(lambda row, label=label: row["labels"] == [label]))
        for name in ("rewards", "logps"):
            assert together[f"eval_{name}/{side}"] == pytest.approx(alone[f"eval_{name}/{side}"], rel=1e-5)
    margin = together["eval_rewards/chosen"] - together["eval_rewards/rejected"]
    assert together["eval_rewards/margins"] == pytest.approx(margin, rel=1e-9)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_compute_metrics_gets_lists_filled_up(size, tmp_path):
    """Lists of 2, 3, 4, 2, 3 responses: `[5, 4]`, with −100 for missing responses
    and 1 for the best, for any batch size.
    """
    seen = []
    settings = {"loss_type": "plackett_luce", "train_dataset": None, "per_device_eval_batch_size": size}
    trainer = make_trainer(
        tmp_path, **away(), **settings, compute_metrics=lambda prediction: seen.append(prediction) or {}
    )
    data = list_rows(5)
    metrics = trainer.evaluate(data)
    rewards, labels = seen[0].predictions, seen[0].label_ids
    lengths = [len(ranks) for ranks in data["ranks"]]
    assert rewards.shape == labels.shape == (5, 4)
    best = [int(np.argmin(ranks)) for ranks in data["ranks"]]
    for row, length in enumerate(lengths):
        assert labels[row, :length].tolist() == [float(place == best[row]) for place in range(length)]
    assert rewards[range(5), best].mean() == pytest.approx(metrics["eval_rewards/best"], rel=1e-5)
    assert all(np.isin(labels[row, length:], (0.0, -100.0)).all() for row, length in enumerate(lengths))


def test_compute_metrics_gets_one_reward_and_its_label(tmp_path):
    seen = []
    trainer = make_trainer(
        tmp_path, **away(), loss_type="kto", compute_metrics=lambda prediction: seen.append(prediction) or {}
    )
    data = unpaired(5)
    metrics = trainer.evaluate(data)
    assert seen[0].predictions.shape == seen[0].label_ids.shape == (5, 1)
    assert seen[0].label_ids[:, 0].tolist() == [float(row["labels"][0]) for row in data]
    desirable = seen[0].predictions[seen[0].label_ids == 1]
    assert desirable.mean() == pytest.approx(metrics["eval_rewards/chosen"], rel=1e-5)


def test_the_accuracy_of_lists_by_hand(tmp_path):
    """The policy is untrained, so all rewards are 0 and the best of K is first with
    probability 1/K: (½ + ⅓ + ¼)/3 over lists of 2, 3, 4.
    """
    metrics = make_trainer(tmp_path, loss_type="s_dpo", train_dataset=None).evaluate(list_rows(3))
    assert metrics["eval_rewards/accuracies"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert metrics["eval_rewards/margins"] == metrics["eval_rewards/best"] == 0


@pytest.mark.parametrize(("loss", "data"), [("bco", unpaired), ("plackett_luce", list_rows)])
def test_reports_take_their_metrics(loss, data, tmp_path):
    """Card, figure and table of a run without accuracies, or without chosen and rejected rewards."""
    settings = {"train_dataset": data(4), "eval_dataset": data(3), "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(tmp_path, **away(), loss_type=loss, max_steps=2, eval_on_start=True, **settings)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"**{loss}**" in card and "eval_rewards/margins" in card
    record = record_run(trainer, trainer.card_facts())
    assert plot_training(record, tmp_path / "curves.png").stat().st_size > 10_000
    assert "Δ log p" in report_page(record)
    console = Console(width=100, file=StringIO())
    console.print(evaluation_table(results_of(record)))
    table = console.file.getvalue()
    expected = ["chosen reward", "rejected reward"] if loss == "bco" else ["reward accuracy", "best reward"]
    assert all(label in table for label in ["loss", "reward margin", *expected])


REAL = Dataset.from_list(real_rows("gsm8k"))
LONG = functools.partial(tiny_model, vocab_size=600, max_position_embeddings=512)


def test_real_labeled_rows_train(tmp_path):
    """The data are eight raw answers to four problems, with two epochs of KTO;
    mismatched responses are from other problems.
    """
    settings = {"train_dataset": REAL, "eval_dataset": REAL, "processing_class": tiny_tokenizer(), "max_length": 512}
    trainer = make_trainer(tmp_path, LONG(), loss_type="kto", **settings)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0.5, abs=1e-6)  # r = z = 0: 1 − σ(0)
    assert trainer.evaluate()["eval_rewards/margins"] > 0


def test_real_lists_train(tmp_path):
    rows = [
        {
            "prompt": row["prompt"],
            "responses": [reply(response["content"]) for response in row["responses"]],
            "scores": [response["wins"] / 3 for response in row["responses"]],
        }
        for row in real_rows("qa_feedback")
    ]
    settings = {"train_dataset": Dataset.from_list(rows), "processing_class": tiny_tokenizer()}
    trainer = make_trainer(tmp_path, LONG(), loss_type="lipo", **settings)
    trainer.train()
    # All rewards are equal at first, so two responses have random places: the mean over all 12 pairs of places. The
    # four-way
    # tie of scores compares nothing.
    gains, discounts = 2 ** (np.array([2.5, 2.5, 0.5, 0.5]) / 3), 1 / np.log(np.arange(2, 6))
    apart = np.abs(discounts[:, None] - discounts).sum() / 12
    expected = sum((gains[i] - gains[j]) * apart * math.log(2) for i in (0, 1) for j in (2, 3))
    assert logged(trainer, "loss")[0] == pytest.approx(expected / 2, rel=1e-5)


def test_data_of_another_kind_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="the train dataset holds pairs, but kto needs rows with `label`, or pairs with unpair"
    ):
        make_trainer(tmp_path, loss_type="kto", train_dataset=pairs(2))
    with pytest.raises(ValueError, match="the eval dataset holds lists, but dpo needs pairs"):
        make_trainer(tmp_path, train_dataset=pairs(2), eval_dataset=list_rows(2))
    with pytest.raises(ValueError, match="unpair=True makes unpaired examples, but dpo needs pairs"):
        make_trainer(tmp_path, unpair=True)


def test_ranks_are_no_scores(tmp_path):
    ranked = list_rows(2).map(lambda row: {"scores": []})
    with pytest.raises(ValueError, match="it compares scores, but these rows have only `ranks`"):
        make_trainer(tmp_path, loss_type="infonca", train_dataset=ranked)
    make_trainer(tmp_path, loss_type="plackett_luce", train_dataset=ranked)


def test_a_stream_has_no_other_prompts_to_draw_from(tmp_path):
    stream = unpaired(4).to_iterable_dataset()
    with pytest.raises(ValueError, match="draws responses to other prompts from the whole dataset"):
        make_trainer(tmp_path, loss_type="kto", train_dataset=stream, max_steps=1)
    trainer = make_trainer(tmp_path, loss_type="bco", train_dataset=stream, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize(
    ("labels", "given", "advice"),
    [
        (
            [True] * 2 + [False] * 6,
            {},
            "2 desirable and 6 undesirable examples have a weight ratio of 0.333; .*desirable_weight=3 in",
        ),
        ([True] * 6 + [False] * 2, {}, "weight ratio of 3; .*: set undesirable_weight=2.25 in loss_params"),
        ([True, False] * 4, {"desirable_weight": 2.0}, "weight ratio of 2; .*: leave both weights at 1"),
        ([True] * 2 + [False] * 6, {"desirable_weight": 3.5}, None),
        ([True] * 4 + [False] * 3, {}, None),
    ],
)
def test_labels_out_of_balance_are_pointed_out_once(labels, given, advice, tmp_path, caplog):
    """Outside of [1, 4/3], a message has the counts and the fix; the fix stops the
    message. One class has no balance.
    """
    data = unpaired(len(labels)).map(lambda row, at: {"labels": [labels[at]]}, with_indices=True)
    with caplog.at_level(logging.WARNING, logger="hf_prefopt"):
        make_trainer(tmp_path, loss_type="kto", loss_params=given, train_dataset=data)
    said = [record.getMessage() for record in caplog.records if "recommend 1 to 4/3" in record.getMessage()]
    assert len(said) == (advice is not None)
    assert advice is None or re.search(advice, said[0])


ONE_LABEL = "{0} of {0} examples are {1}desirable: without "


@pytest.mark.parametrize("loss", ["kto", "bco", "apo_zero_unpaired"])
@pytest.mark.parametrize("label", [True, False])
def test_data_of_one_label_are_pointed_out(loss, label, tmp_path, caplog):
    """With the count, for training and for evaluation; a set of both labels has no such line."""
    one, other = (unpaired(6, seed).map(lambda row: {"labels": [label]}) for seed in (0, 1))
    with caplog.at_level(logging.WARNING, logger="hf_prefopt"):
        make_trainer(tmp_path, loss_type=loss, train_dataset=one, eval_dataset={"one": other, "both": unpaired(4)})
    found = [text for text in caplog.messages if "examples are" in text]
    expected = ONE_LABEL.format(6, "" if label else "un")
    assert [text.partition(": ")[0] for text in found] == ["train", "one"] and all(expected in text for text in found)


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"loss_type": "npo"}, True),
        ({"loss_type": "sft"}, False),
        ({"loss_type": "kto", "loss_params": {"undesirable_weight": 0.0}}, False),
    ],
)
def test_a_label_without_a_gradient_cannot_be_trained_on_alone(settings, label, tmp_path, caplog):
    """Such a set can be evaluated, which is said. The other label alone has a gradient, and so have both."""
    one = unpaired(6).map(lambda row: {"labels": [label]})
    message = f"train: all examples .6 rows. are {'' if label else 'un'}desirable, for which .* has no gradient"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, train_dataset=one, **settings)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hf_prefopt"):
        make_trainer(tmp_path, train_dataset=unpaired(6), eval_dataset=one, **settings)
    (said,) = [text for text in caplog.messages if text.startswith("eval: ")]
    assert "has no gradient" in said or ONE_LABEL.format(6, "" if label else "un") in said
    opposite = unpaired(6).map(lambda row: {"labels": [not label]})
    trainer = make_trainer(tmp_path, tiny_model(), train_dataset=opposite, max_steps=1, **settings)
    trainer.train()
    assert logged(trainer, "grad_norm")[0] > 0


def test_sources_of_one_label_each_make_a_mixture_of_both(tmp_path, caplog):
    """The advice is about the mixture, not about its sources."""
    sources = [
        Source(unpaired(4, seed=seed).map(lambda row, label=label: {"labels": [label]}), name)
        for seed, (name, label) in enumerate({"good": True, "bad": False}.items())
    ]
    with caplog.at_level(logging.WARNING, logger="hf_prefopt"):
        make_trainer(tmp_path, loss_type="kto", train_dataset=Mixture(sources))
        assert not [text for text in caplog.messages if "desirable" in text]
        make_trainer(tmp_path, loss_type="kto", train_dataset=Mixture([sources[0], replace(sources[1], weight=0.5)]))
    (said,) = [text for text in caplog.messages if "desirable" in text]
    assert said.startswith("train: 4 desirable and 2 undesirable examples have a weight ratio of 2; ")


def test_lipo_refuses_scores_that_are_no_gains(tmp_path):
    """The scores are raw scores of a reward model: the error names the row, and rescaled scores train."""
    raw = list_rows(4).map(lambda row: {"scores": [10 * s if row["row"] in (1, 3) else s for s in row["scores"]]})
    with pytest.raises(ValueError, match=r"does not fit lipo: row 1 \(and 1 more rows\): its scores reach 3"):
        make_trainer(tmp_path, loss_type="lipo", train_dataset=raw)
    make_trainer(tmp_path, loss_type="lipo", loss_params={"normalize_scores": True}, train_dataset=raw)
    streamed = make_trainer(tmp_path, loss_type="lipo", train_dataset=raw.to_iterable_dataset(), max_steps=1)
    with pytest.raises(ValueError, match="the train dataset does not fit lipo: row 1"):
        streamed.train()
