"""Optional columns of the data (weights, margins, scores, win rates), from the raw row to the loss."""

import logging

import pytest
import torch
from datasets import Dataset

from hf_prefopt.data.prepare import prepare_dataset
from hf_prefopt.kinds.made_up import made_up_inputs
from hf_prefopt.losses import get_loss
from hf_prefopt.objective.build import build_objective
from tests.data.helpers import real_rows, text_pair
from tests.test_trainer_exactness import DESCENT, off_reference, run
from tests.tiny_models import perturbed, tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trainers import examples, lists, logged, make_config, make_trainer, pairs, unpaired, weights, with_column

TOKENIZER = tiny_tokenizer()
KINDS = {"dpo": pairs, "kto": unpaired, "plackett_luce": lists}


def prepared(rows: list[dict], **options) -> Dataset:
    return prepare_dataset(Dataset.from_list(rows), TOKENIZER, **options)


ALIASES = {
    "weight": "weights",
    "sample_weight": "weights",
    "margin": "margins",
    "chosen_score": "chosen_scores",
    "score_chosen": "chosen_scores",
    "chosen-rating": "chosen_scores",
    "rejected_score": "rejected_scores",
    "score_rejected": "rejected_scores",
    "chosen_win_rate": "chosen_win_rates",
    "p_chosen": "chosen_win_rates",
    "rejected_win_rate": "rejected_win_rates",
}


@pytest.mark.parametrize(("column", "name"), ALIASES.items())
def test_a_column_travels_with_its_pair(column, name):
    rows = prepared([{**text_pair(), column: 0.5}, {**text_pair(), column: 1}])
    assert rows[name][:] == [[0.5], [1.0]]
    assert [*rows.features] == ["prompt_ids", "response_ids", "scored_masks", "pairs", name, "row"]


def test_columns_of_every_kind_and_format():
    """A weight with a label, a list, a stream and token ids; two unpaired rows have the weight of their pair."""
    labeled = {"prompt": "A", "completion": " b", "label": True, "weight": 2}
    listed = {"prompt": "A", "responses": [" b", " c"], "scores": [0, 1], "weight": 2}
    ids = {"prompt_ids": [7], "chosen_ids": [8], "rejected_ids": [9], "weight": 2}
    for row in (labeled, listed, ids):
        assert prepared([row])["weights"][:] == [[2.0]]
        stream = Dataset.from_list([row]).to_iterable_dataset()
        assert next(iter(prepare_dataset(stream, TOKENIZER)))["weights"] == [2.0]
    unpaired_rows = prepared([{**text_pair(), "weight": 2}, {**text_pair(), "weight": 3}], unpair=True)
    assert unpaired_rows["weights"][:] == [[2.0], [2.0], [3.0], [3.0]]


def test_ultrafeedback_and_pandalm_fit_as_they_are(tmp_path):
    """odpo uses `score_chosen` and `score_rejected`. sppo uses PandaLM's share of votes as
    the win rate P of the chosen response, and 1 − P for the other. At the reference, r = 0,
    so the loss is ½·2·((P − ½)/β)². For P = 1, ⅔ and ½, this is (25 + 25/9 + 0)/3 at β = 0.1.
    """
    rows = [
        {**text_pair(), "score_chosen": 8.5, "score_rejected": 6.0},
        {**text_pair(), "score_chosen": 7, "score_rejected": 6},
    ]
    given = {"train_dataset": Dataset.from_list(rows), "processing_class": TOKENIZER}
    trainer = make_trainer(tmp_path, tiny_model(vocab_size=600), loss_type="odpo", max_steps=1, **given)
    trainer.train()
    # At the reference h = 0: ℓ(−log ΔR) = log(1 + ΔR), for ΔR = 2.5 and 1.
    assert logged(trainer, "loss")[0] == pytest.approx(torch.tensor([3.5, 2.0]).log().mean().item(), rel=1e-5)
    soft = {"train_dataset": Dataset.from_list(real_rows("pandalm")), "processing_class": TOKENIZER}
    trainer = make_trainer(
        tmp_path, tiny_model(vocab_size=600), loss_type="sppo", beta=0.1, per_device_train_batch_size=3, **soft
    )
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx((25 + (0.6667 - 0.5) ** 2 * 100) / 3, rel=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "plackett_luce"])
def test_a_weight_multiplies_its_example_and_not_the_count(loss, tmp_path):
    """Weights 0, 1, 2, 0, 1, 2: the loss of the evaluation is Σ w_i ℓ_i / 6, with
    ℓ_i from rows evaluated alone; rewards do not depend on the weights.
    """
    rows = KINDS[loss](6)
    model = {"model": perturbed(tiny_model(), scale=0.05), "ref_model": tiny_model()}
    plain = make_trainer(tmp_path, **model, loss_type=loss, train_dataset=rows)
    alone = [plain.evaluate(rows.select([row]))["eval_loss"] for row in range(6)]
    unweighted = plain.evaluate(rows)
    heavy_rows = with_column(rows, "weights", lambda row: row % 3)
    heavy = make_trainer(tmp_path, **model, loss_type=loss, train_dataset=heavy_rows)
    metrics = heavy.evaluate(heavy_rows)
    assert metrics["eval_loss"] == pytest.approx(sum(row % 3 * alone[row] for row in range(6)) / 6, rel=1e-5)
    assert {name: value for name, value in metrics.items() if "rewards" in name} == {
        name: value for name, value in unweighted.items() if "rewards" in name
    }


@pytest.mark.parametrize("loss", ["kto", "plackett_luce", "beta_dpo"])
def test_weights_and_accumulation(loss, tmp_path):
    """1×8 = 8×1 with weights and an additional NLL, also for batch-wise losses; a weight of 0 trains nothing."""
    rows = with_column(KINDS.get(loss, pairs)(8), "weights", lambda row: row % 3)
    objective = {"loss_type": loss, "sft_weight": 0.5}
    settings = {"train_dataset": rows, "learning_rate": 0.01, "max_grad_norm": 1.0}
    _, expected = run(tmp_path, objective, 8, 1, **settings)
    _, change = run(tmp_path, objective, 1, 8, **settings)
    for name, value in expected.items():
        torch.testing.assert_close(change[name], value, rtol=0, atol=1e-9 * value.abs().max().item() + 1e-300)
    nothing = with_column(KINDS.get(loss, pairs)(8), "weights", lambda row: 0)
    _, none = run(tmp_path, objective, 8, 1, **{**settings, "train_dataset": nothing})
    assert all((value == 0).all() for value in none.values())


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_weights_are_said_once_for_each_data_set(loss, tmp_path, caplog):
    """Weights 0, 1, 2, 0, 1, 2: the message says six examples from 0 to 2, 1 on average. For a stream, it only says
    that there are weights. Without the column, there is no message.
    """
    rows = with_column(KINDS.get(loss, pairs)(6), "weights", lambda row: row % 3)
    said = "train: the column `weight` multiplies the losses of its examples"
    for data, expected in (
        (rows, f"{said}: 6 examples, weights from 0 to 2, 1 on average"),
        (rows.to_iterable_dataset(), said),
        (rows.remove_columns("weights"), None),
    ):
        if loss == "kto" and not isinstance(data, Dataset):
            continue  # KTO draws responses from the whole dataset
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hf_prefopt"):
            make_trainer(tmp_path, loss_type=loss, train_dataset=data, max_steps=1).train()
        lines = [record.getMessage() for record in caplog.records if "`weight`" in record.getMessage()]
        assert lines == ([expected] if expected else [])


STREAMED = {
    "token weights": ({"loss_type": "tis_dpo"}, "tis_dpo: it weights tokens, but these rows have no weights: provide"),
    "weighed tokens": ({"use_token_weights": True}, "dpo: it weights tokens, but these rows have no weights: provide"),
    "scores": ({"loss_type": "odpo"}, "odpo: columns of numbers are missing, `chosen_score`, `rejected_score`: add"),
}


@pytest.mark.parametrize(("settings", "reason"), STREAMED.values(), ids=STREAMED)
def test_a_stream_without_a_column_is_refused_at_construction(settings, reason, tmp_path):
    with pytest.raises(ValueError, match=f"the train dataset does not fit {reason}"):
        make_trainer(tmp_path, **settings, train_dataset=pairs(3).to_iterable_dataset(), max_steps=1)


def test_a_row_of_a_stream_without_scores_is_refused_when_it_comes(tmp_path):
    """A ranked list follows two scored lists, and the loss needs scores."""
    rows = lists(3).map(lambda row: {"scores": [] if row["row"] == 2 else row["scores"]})
    trainer = make_trainer(tmp_path, loss_type="lipo", train_dataset=rows.to_iterable_dataset(), max_steps=2)
    with pytest.raises(
        ValueError, match=r"the train dataset does not fit lipo: row 2: it compares scores, .*a column `scores`"
    ):
        trainer.train()


def test_equal_weights_are_a_factor():
    inputs = made_up_inputs() | {"weights": torch.full((5,), 3.0, dtype=torch.float64)}
    for names in (["dpo"], ["simpo", "sft"], ["kto"], ["infonca"]):
        heavy, plain = (build_objective(names, columns=columns)(inputs).losses for columns in (["weights"], []))
        torch.testing.assert_close(heavy, 3 * plain)


@pytest.mark.parametrize("loss", ["dpo", "dpo_norm", "hinge", "simpo"])
def test_margins_reach_the_losses_that_subtract_them(loss, tmp_path):
    """The trainer's loss with a column of margins equals the loss function with margins; without the column there are
    no margins, and an evaluation set without it has margins of 0.
    """
    rows = with_column(pairs(6), "margins", lambda row: row / 4)
    objective = {"loss_type": loss, "sft_weight": 0.2}
    model, reference = off_reference(objective)
    assert "margins" not in make_config("unused", **objective).build_objective().inputs
    trainer = make_trainer(tmp_path, model, **reference, **objective, train_dataset=rows)
    assert "margins" in trainer.criterion.inputs
    zero = with_column(pairs(6), "margins", lambda row: 0)
    without = [trainer.evaluate(data)["eval_loss"] for data in (zero, pairs(6))]
    assert without[0] == without[1] != trainer.evaluate(rows)["eval_loss"]


def test_a_margin_of_alpha_log_delta_r_makes_dpo_odpo():
    inputs = made_up_inputs()
    inputs["margins"] = 0.6 * (inputs["chosen_scores"] - inputs["rejected_scores"]).log()
    odpo = build_objective(["odpo"], loss_params={"alpha": 0.6})(inputs)
    torch.testing.assert_close(build_objective(["dpo"], columns=["margins"])(inputs).losses, odpo.losses)


def test_modifiers_compose():
    """The loss is 0.7 hinge with margins and WPO weights + 0.3 ipo + 0.5 sft, all times the example's weight."""
    inputs = made_up_inputs()
    inputs |= {"margins": torch.rand(5).double(), "weights": torch.arange(5).double()}
    objective = build_objective(
        ["hinge", "ipo"], [0.7, 0.3], sft_weight=0.5, use_weighting=True, columns=["weights", "margins"]
    )
    wpo = (inputs["policy_chosen_alignment"] + inputs["policy_rejected_alignment"]).clamp(max=0).exp()
    parts = {
        name: get_loss(name)(**{key: inputs[key] for key in get_loss(name).inputs}).losses
        for name in ("hinge", "ipo", "sft")
    }
    expected = inputs["weights"] * (wpo * (0.7 * parts["hinge"] + 0.3 * parts["ipo"]) + 0.5 * parts["sft"])
    torch.testing.assert_close(objective(inputs).losses, expected)


@pytest.mark.parametrize(
    ("losses", "options", "reason"),
    [
        (
            ["dr_dpo"],
            {"use_weighting": True},
            "use_weighting=True weights .* but dr_dpo is one value",
        ),
        (["dpo", "dr_dpo"], {"columns": ["weights"]}, "`weight` weights .* dr_dpo is one value .*: remove the column"),
        (
            ["ipo"],
            {"columns": ["margins"]},
            "`margin`, but ipo has no margin: remove the column, or choose one of dpo, ",
        ),
        (["odpo"], {"columns": ["margins"]}, "odpo has no margin"),
    ],
)
def test_combinations_without_meaning_are_refused(losses, options, reason):
    with pytest.raises(ValueError, match=reason):
        build_objective(losses, **options)


def test_they_are_refused_at_construction_with_the_data(tmp_path):
    rows = with_column(pairs(4), "margins", lambda row: 1)
    with pytest.raises(ValueError, match="a column `margin`, but ipo has no margin"):
        make_trainer(tmp_path, loss_type="ipo", train_dataset=rows)
    make_trainer(tmp_path, loss_type="ipo", train_dataset=rows.remove_columns("margins"))


@pytest.mark.parametrize(
    ("loss", "column", "value", "reason"),
    [
        (
            "odpo",
            "rejected_scores",
            lambda row: 9 if row == 2 else 0,
            "odpo: row 2: its chosen_score 4 is not above",
        ),
        (
            "odpo",
            "rejected_scores",
            lambda row: float("nan") if row else 1,
            "row 1 .and 2 more rows.: `rejected_score`",
        ),
        (
            "sppo",
            "chosen_win_rates",
            lambda row: 70 if row == 3 else 0.5,
            "row 3: `chosen_win_rate` is 70; .* 0 to 1",
        ),
        (
            "dpo",
            "weights",
            lambda row: -1 if row == 1 else 1,
            "row 1: `weight` is -1; .*a number of 0 or more",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused_by_row(loss, column, value, reason, tmp_path):
    rows = examples(make_config("unused", loss_type=loss).build_objective(), 4)
    rows = with_column(rows.remove_columns([name for name in rows.column_names if name == column]), column, value)
    with pytest.raises(ValueError, match=reason):
        make_trainer(tmp_path, loss_type=loss, train_dataset=rows)
    trainer = make_trainer(tmp_path, loss_type=loss, train_dataset=rows.to_iterable_dataset(), max_steps=2)
    with pytest.raises(ValueError, match=reason.replace(" .and 2 more rows.", ".*")):
        trainer.train()


def test_a_ratio_wants_positive_scores(tmp_path):
    rows = with_column(with_column(pairs(3), "chosen_scores", lambda row: 1), "rejected_scores", lambda row: row - 2)
    make_trainer(tmp_path, loss_type="odpo", train_dataset=rows)
    with pytest.raises(ValueError, match=r"row 0 .*: its rejected_score -2 is not above 0, which margin="):
        make_trainer(tmp_path, loss_type="odpo", loss_params={"margin": "ratio"}, train_dataset=rows)
    with pytest.raises(ValueError, match="margin='quotient' is not one of difference, ratio"):
        make_config(tmp_path, loss_type="odpo", loss_params={"margin": "quotient"})


def test_missing_columns_are_named_together_and_may_have_other_names(tmp_path):
    given = {"loss_type": "rpo_sq", "train_dataset": [{**text_pair(), "good": 3.0, "bad": 1.0}] * 2}
    given |= {"processing_class": TOKENIZER, "model": tiny_model(vocab_size=600)}
    with pytest.raises(ValueError, match="rpo_sq: columns of numbers are missing, `chosen_score`, `rejected_score`"):
        make_trainer(tmp_path, **given)
    make_trainer(tmp_path, column_mapping={"chosen_score": "good", "rejected_score": "bad"}, **given)


def test_a_column_that_no_loss_asks_for_may_hold_anything(tmp_path):
    """Some scores are None, but DPO does not use them, and its training does not change."""
    rows = [{**text_pair(), "score_chosen": None}, {**text_pair(), "score_chosen": 3.0}]
    given = {"processing_class": TOKENIZER, "max_steps": 1, **DESCENT}
    changes = []
    for data in (rows, [text_pair()] * 2):
        trainer = make_trainer(tmp_path, tiny_model(vocab_size=600), train_dataset=Dataset.from_list(data), **given)
        trainer.train()
        changes.append(weights(trainer.model))
    assert all(torch.equal(value, changes[1][name]) for name, value in changes[0].items())


def soft_rows(count=4):
    """Return pairs whose chosen response is better with probability 3/8, 4/8, …, 7/8, 3/8, …"""
    return with_column(pairs(count), "chosen_win_rates", lambda row: (3 + row % 5) / 8)


@pytest.mark.parametrize("loss", ["dpo", "dpo_norm", "wpo"])
def test_soft_labels_are_label_smoothing_by_pair(loss, tmp_path):
    """The evaluation's loss is the mean of p·ℓ_i + (1 − p)·ℓ'_i. ℓ_i is the loss of a row alone, and ℓ'_i that with
    swapped responses. In fp32, this equals label smoothing with ε = 1 − p.
    """
    rows = soft_rows()
    model = {"model": perturbed(tiny_model(), scale=0.05), "ref_model": tiny_model(), "loss_type": loss}
    soft = make_trainer(tmp_path, **model, train_dataset=rows, use_win_rates=True)
    metrics = soft.evaluate(rows)
    plain = make_trainer(tmp_path, **model, train_dataset=pairs(4))
    expected = 0.0
    for number, row in enumerate(pairs(4)):
        losses = [
            plain.evaluate(Dataset.from_list([{**row, "pairs": [pair]}]))["eval_loss"] for pair in ([0, 1], [1, 0])
        ]
        p = (3 + number % 5) / 8
        expected += (p * losses[0] + (1 - p) * losses[1]) / 4
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_rewards/margins"] == plain.evaluate(pairs(4))["eval_rewards/margins"]


def test_win_rates_are_used_only_where_they_are_asked_for(tmp_path, caplog):
    """Without the setting, the loss is that of hard labels, with a message; with it, the start summary has a line."""
    given = {"model": perturbed(tiny_model(), scale=0.05), "ref_model": tiny_model(), "train_dataset": soft_rows()}
    with caplog.at_level(logging.WARNING):
        hard = make_trainer(tmp_path, **given)
    assert "train: win_rate is not read: use_win_rates=True converts it to soft labels" in caplog.text
    assert (
        hard.evaluate(soft_rows())["eval_loss"]
        == make_trainer(tmp_path, **{**given, "train_dataset": pairs(4)}).evaluate(pairs(4))["eval_loss"]
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        soft = make_trainer(tmp_path, **given, use_win_rates=True, max_steps=1)
        soft.train()
    assert "not read" not in caplog.text and "the losses read chosen_win_rate" in caplog.text
    assert "1 × dpo, beta=0.1, label_smoothing=0.0, win_rate as soft labels" in caplog.text


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 applies to all pairs, but the column `win_rate` already"),
        ({"loss_type": "ipo"}, "soft labels, but ipo has no soft labels: .* dpo, dpo_norm, wpo"),
        ({"loss_type": ["dpo", "bco_pair"]}, "bco_pair has no soft labels"),
        ({"loss_type": "kto"}, "kto has no soft labels"),
        ({"loss_type": "sft"}, "sft has no soft labels"),
        ({"loss_type": "sppo"}, "sppo already reads `win_rate`"),
    ],
)
def test_soft_labels_without_meaning_are_refused(settings, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        make_config(tmp_path, use_win_rates=True, **settings)


def test_win_rates_that_do_not_fit_are_refused_by_row(tmp_path):
    soft = {"use_win_rates": True, "loss_type": ["dpo", "sft"]}
    with pytest.raises(ValueError, match="sft: columns of numbers are missing, `chosen_win_rate`: add"):
        make_trainer(tmp_path, **soft, train_dataset=pairs(3))
    for value, found in ((1.5, "is 1.5"), (-0.1, "is -0.1"), (float("nan"), "has no number")):
        rows = with_column(pairs(3), "chosen_win_rates", lambda row, value=value: value if row == 2 else 0.5)
        with pytest.raises(ValueError, match=f"row 2: `chosen_win_rate` {found}; give every row a number from 0 to 1"):
            make_trainer(tmp_path, **soft, train_dataset=rows)
    with pytest.raises(ValueError, match=r"`win_rate` and `margin` both state .*remove one of them"):
        make_trainer(tmp_path, **soft, train_dataset=with_column(soft_rows(), "margins", lambda row: 1))
