"""Weights of undesirable rows: prompts that are unlike those of desirable rows weigh less (BCO's UDM)."""

import sys

import numpy as np
import pytest
from datasets import Dataset

from hf_prefopt.data.bco_weights import distribution_matching_weights
from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trainers import make_trainer

pytest.importorskip("sklearn")


def balanced_regression(x, y, steps=50):
    """Fit θ = (w, b) = argmin ½|w|² + Σ_i s_i·NLL_i, s_i = n/(2·n_class), by Newton's method in float64.

    Returns:
        θ, and the smallest curvature of this sum at its minimum, divided by n.
    """
    share = np.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))
    design = np.column_stack([x, np.ones(len(x))])
    ridge = np.diag([*np.ones(x.shape[1]), 0.0])
    theta = np.zeros(design.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-design @ theta))
        gradient = design.T @ (share * (p - y)) + ridge @ theta
        hessian = design.T @ (design * (share * p * (1 - p))[:, None]) + ridge
        theta -= np.linalg.solve(hessian, gradient)
    return theta, np.linalg.eigvalsh(hessian / len(y)).min()


def test_weights_are_the_odds_of_a_balanced_regression():
    """There are 40 desirable and 20 undesirable prompts, one standard deviation apart in one of three directions.

    p/(1 − p) = e^(w·x + b), and Newton's method finds the minimum here. The library stops when no entry of the gradient
    of the mean exceeds 1e-4, so θ is off by at most |gradient|/curvature, and log-odds by |(x, 1)| times that.
    """
    generator = np.random.default_rng(3)
    labels = np.arange(60) % 3 < 2
    prompts = generator.normal(size=(60, 3)) + labels[:, None] * np.array([1.0, 0.0, 0.0])
    theta, curvature = balanced_regression(prompts, labels)
    design = np.column_stack([prompts, np.ones(60)])
    log_odds = design @ theta
    tolerance = np.linalg.norm(design, axis=1).max() * 1e-4 * 2 / curvature
    assert tolerance < 0.01 < log_odds.std()
    wide = distribution_matching_weights(prompts, labels, low=0.0, high=np.inf)
    np.testing.assert_allclose(np.log(wide[~labels]), log_odds[~labels], rtol=0, atol=tolerance)
    found = distribution_matching_weights(prompts, labels)
    np.testing.assert_array_equal(found, np.where(labels, 1.0, wide.clip(0.5, 10)))


def test_prompts_that_say_nothing_weigh_one():
    """All prompts are equal, three desirable to one undesirable: balanced, p = ½, so the odds are 1 and not 3."""
    weights = distribution_matching_weights(np.zeros((8, 2)), [True, True, True, False] * 2)
    np.testing.assert_allclose(weights, 1.0, rtol=1e-6)


def test_weights_stay_within_their_bounds():
    """Undesirable prompts among the desirable ones (x = 40) weigh up to 10, and those far away (x = −40) weigh ½.

    Nine of ten desirable prompts are at 40, and nine of ten undesirable prompts are at −40.
    """
    at = np.array([40.0] * 9 + [-40.0] + [-40.0] * 9 + [40.0])[:, None]
    weights = distribution_matching_weights(at, [True] * 10 + [False] * 10)
    # The balanced odds are 9 : 1; the penalty pulls them towards 1, which is negligible at x = 40.
    np.testing.assert_allclose(weights, [1.0] * 10 + [0.5] * 9 + [9.0], rtol=1e-2)
    np.testing.assert_allclose(distribution_matching_weights(at, [True] * 10 + [False] * 10, high=3.0)[-1], 3.0)


def test_so_many_prompts_of_a_class_are_enough():
    """The regression uses two prompts of each class, drawn with the seed; every example still gets a weight."""
    generator = np.random.default_rng(0)
    prompts, labels = generator.normal(size=(50, 2)), np.arange(50) % 2 == 0
    few = [distribution_matching_weights(prompts, labels, prompts_per_class=2, seed=seed) for seed in (0, 0, 1)]
    assert few[0].shape == (50,) and (few[0] == few[1]).all() and (few[0] != few[2]).any()


@pytest.mark.parametrize(
    ("embeddings", "labels", "options", "message"),
    [
        (np.zeros(3), [True] * 3, {}, r"embeddings \(3,\) and labels \(3,\): pass a matrix"),
        (np.zeros((3, 2)), [True] * 2, {}, "one label per row"),
        (np.array([[0.0], [np.nan]]), [True, False], {}, r"row 1 \(and 0 more\): the embedding is not finite"),
        (np.zeros((2, 1)), [True, True], {}, "all 2 examples are desirable"),
        (np.zeros((2, 1)), [False, False], {}, "all 2 examples are undesirable"),
        (np.zeros((2, 1)), [4, 0], {}, "row 0: the label is "),
        (np.zeros((2, 1)), [True, False], {"low": 2.0, "high": 1.0}, "low=2.0, high=1.0"),
        (np.zeros((2, 1)), [True, False], {"prompts_per_class": 0}, "prompts_per_class=0"),
    ],
)
def test_what_does_not_fit_is_refused(embeddings, labels, options, message):
    with pytest.raises(ValueError, match=message):
        distribution_matching_weights(embeddings, labels, **options)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"hf_prefopt\[bco\]"):
        distribution_matching_weights(np.zeros((2, 1)), [True, False])


def test_the_weights_are_a_column_of_bco(tmp_path):
    """At the reference, every reward is 0, and so is δ: the loss of a row is w log 2, and the mean is mean(w) log 2."""
    texts = ["The capital of France is", "2+2?", "2+3?", "The capital of Italy is"]
    rows = Dataset.from_list(
        [{"prompt": text, "completion": " Yes.", "label": label} for text in texts for label in (True, text[0] == "T")]
    )
    embedded = [[float(text[0] == "2")] for text in rows["prompt"]]
    rows = rows.add_column("weight", distribution_matching_weights(embedded, rows["label"]))
    given = {"train_dataset": rows, "processing_class": tiny_tokenizer(), "max_steps": 1}
    trainer = make_trainer(tmp_path, tiny_model(vocab_size=600), loss_type="bco", **given)
    loss = trainer.evaluate(rows)["eval_loss"]
    assert loss == pytest.approx(np.mean(rows["weight"]) * np.log(2), rel=1e-6)
    assert min(rows["weight"]) < 0.9
