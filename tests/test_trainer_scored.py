"""Single responses with a quantile, from raw rows to QRPO's numbers."""

import math

import pytest
import torch
from datasets import Dataset

from hf_prefopt.kinds import SCORED
from hf_prefopt.losses import qrpo_loss
from tests.losses.pairs import vector
from tests.test_trainer_exactness import DESCENT, run
from tests.tiny_models import perturbed, tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trainers import logged, make_trainer, scored

ROW = {"prompt": "The sky is", "completion": " blue."}


def trainer_of(folder, rows, **settings):
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": tiny_tokenizer()}
    settings = {"loss_type": "qrpo", "per_device_train_batch_size": len(rows), **data, **settings}
    return make_trainer(folder, tiny_model(vocab_size=600), **settings)


def test_the_targets_are_rewards_of_a_policy():
    """Q is uniform under the reference, and π = π_ref e^r adds up to 1, so the mean of e^(target/β) over Q is 1. At the
    reference, the loss is the squared target. A sum over n midpoints is off by 1/(24 n² β²).
    """
    count = 10_000
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    zeros, lengths = torch.zeros(count, dtype=torch.float64), torch.full((count,), 7)
    for beta, normalized, effective in ((0.2, False, 0.2), (1.0, False, 1.0), (3.5, True, 0.5)):
        losses = qrpo_loss(zeros, zeros, lengths, quantiles, beta=beta, length_normalize=normalized).losses
        # A target increases with Q, from below 0 to above 0.
        target = losses.sqrt() * torch.where(torch.arange(count) <= losses.argmin(), -1, 1)
        assert (target / effective).exp().mean().item() == pytest.approx(1, abs=1e-4)


def test_a_beta_whose_z_overflows():
    """β = 1e-4: e^10000 overflows, but β log Z = 1 + β log β is finite."""
    loss = qrpo_loss(vector(0.0), vector(0.0), torch.tensor([5]), vector(1.0), beta=1e-4).losses.item()
    assert loss == pytest.approx((1e-4 * math.log(1e-4)) ** 2, rel=1e-9)


def test_raw_rows_become_their_loss(tmp_path):
    """At the reference, r = 0: the first loss is the mean of (Q − β log Z)², Z =
    β(e^(1/β) − 1), for Q = 0, ¼ and 1. The response with the largest quantile becomes
    more likely than under the reference, and that with the smallest less likely.
    """
    rows = [{**ROW, "quantile": quantile} for quantile in (0, 0.25, 1.0)]
    rows[0]["completion"], rows[2]["completion"] = " green.", " far away."
    settings = {"beta": 0.5, "learning_rate": 1e-4, "max_steps": 8, "eval_dataset": Dataset.from_list(rows)}
    trainer = trainer_of(tmp_path, rows, **settings)
    trainer.train()
    partition = 0.5 * math.log(0.5 * math.expm1(2))
    expected = sum((quantile - partition) ** 2 for quantile in (0, 0.25, 1)) / 3
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-6)
    assert logged(trainer, "quantiles")[0] == pytest.approx(1.25 / 3)
    assert logged(trainer, "loss")[-1] < expected
    rewards = trainer.predict(trainer.eval_dataset).predictions[:, 0]
    assert rewards[0] < 0 < rewards[2]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([{**ROW, "quantile": 0.5}, {**ROW, "quantile": 1.2}], "row 1: `quantile` is 1.2; set it to the share"),
        ([{**ROW, "quantile": 0.5}, {**ROW, "quantile": None}], "row 1: `quantile` is missing"),
        ([{**ROW, "quantile": 0.5}, {**ROW, "quantile": math.nan}], "row 1: `quantile` is nan"),
        ([{**ROW, "label": True}], "holds unpaired examples, but qrpo needs rows with one response and its `quantile`"),
    ],
)
def test_rows_without_a_quantile_are_named(rows, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        trainer_of(tmp_path, rows)


def test_a_label_beside_it_is_for_the_losses_of_labels(tmp_path):
    """The losses decide which of the two columns is read; a quantile is not a label."""
    both = [{**ROW, "quantile": 0.1, "label": True}]
    assert trainer_of(tmp_path, both).criterion.kind is SCORED
    assert "labels" in trainer_of(tmp_path, both, loss_type="apo_zero_unpaired").train_dataset.column_names
    with pytest.raises(
        ValueError, match="the train dataset holds scored responses, but apo_zero_unpaired needs rows with `label`"
    ):
        trainer_of(tmp_path, [{**ROW, "quantile": 0.1}], loss_type="apo_zero_unpaired")
    with pytest.raises(
        ValueError,
        match=r"unpair=True makes unpaired examples, but qrpo needs rows with one response and its `quantile`",
    ):
        trainer_of(tmp_path, both, unpair=True)


def test_a_step_is_the_mean_over_its_examples(tmp_path):
    """1×8 = 8×1, with weights."""
    rows = scored(8).add_column("weights", [[float(row % 3)] for row in range(8)])
    settings = {**DESCENT, "train_dataset": rows, "learning_rate": 0.01}
    _, expected = run(tmp_path, {"loss_type": "qrpo", "beta": 0.3}, 8, 1, **settings)
    _, change = run(tmp_path, {"loss_type": "qrpo", "beta": 0.3}, 1, 8, **settings)
    assert max(value.abs().max() for value in expected.values()) > 0
    for name, value in expected.items():
        torch.testing.assert_close(change[name], value, rtol=0, atol=1e-9 * value.abs().max().item() + 1e-300)


def test_both_layouts_and_a_reference_of_its_own(tmp_path):
    """Rows that share a prompt have the same evaluation in both layouts, up to fp32 rounding of 50 nats."""
    rows = [{**ROW, "quantile": 0.5}, {**ROW, "completion": " green.", "quantile": 0.1}]
    policy = perturbed(tiny_model(vocab_size=600), 0.05)
    data = {"eval_dataset": Dataset.from_list(rows), "processing_class": tiny_tokenizer(), "train_dataset": None}
    found = [
        make_trainer(tmp_path, policy, ref_model=tiny_model(vocab_size=600), loss_type="qrpo", layout=layout, **data)
        for layout in ("shared", "padded")
    ]
    shared, padded = (trainer.evaluate()["eval_loss"] for trainer in found)
    assert shared == pytest.approx(padded, abs=1e-5)


@pytest.mark.parametrize("value", [1.5, -0.1, float("nan")])
def test_prepared_rows_with_a_quantile_out_of_range_are_refused(value, tmp_path):
    rows = scored(8).remove_columns("quantiles").add_column("quantiles", [[0.5]] * 7 + [[value]])
    with pytest.raises(ValueError, match=r"does not fit qrpo: row 7: its quantile is .* from 0 to 1"):
        make_trainer(tmp_path, loss_type="qrpo", train_dataset=rows)
