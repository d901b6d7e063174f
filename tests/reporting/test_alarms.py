"""The two warnings: the rules on synthetic numbers, a run with displacement, and a run without."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_prefopt.reporting.alarms import FALL, WINDOW, Alarms, Displacement, LengthAlone
from hf_prefopt.reporting.observed import Responses
from tests.tiny_models import random_rows, tiny_model, with_lora
from tests.trainers import logged, make_trainer, pairs


def of_pairs(ratios, lengths=None, logps=None):
    """Return pairs with these mean log-ratios `[B, 2]`."""
    ratios = np.asarray(ratios, dtype=float)
    lengths = np.full(ratios.shape, 10.0) if lengths is None else np.asarray(lengths, dtype=float)
    preferred = np.tile([1.0, 0.0], (len(ratios), 1))
    return Responses(lengths, ratios if logps is None else logps, preferred, ratios if logps is None else None)


def chosen_at(mean, spread, count=WINDOW):
    """Return half of the chosen responses at mean + spread and half at mean −
    spread: the standard error is s/√(n − 1).
    """
    values = mean + spread * np.where(np.arange(count) % 2, 1.0, -1.0)
    return of_pairs(np.stack([values, np.zeros(count)], 1))


def test_the_rule_is_mean_plus_three_standard_errors_below_the_fall():
    """The values are just above and just below −log 1.1 − 3·s/√(n − 1), with s = 0.2 and n = 100."""
    edge = -FALL - 3 * 0.2 / np.sqrt(WINDOW - 1)
    assert Displacement().finding(chosen_at(edge + 1e-6, 0.2)) == {}
    found = Displacement().finding(chosen_at(edge - 1e-6, 0.2))
    assert found["fall"] == pytest.approx(-edge, abs=1e-5) and found["examples"] == WINDOW
    assert found["share"] == pytest.approx(np.exp(-edge) - 1, abs=1e-5)


def test_a_window_is_full_after_a_hundred_examples():
    rule = Displacement()
    assert rule.finding(chosen_at(-1, 0.1, 60)) is None
    assert rule.finding(chosen_at(-1, 0.1, 60))["examples"] == 120
    assert rule.finding(chosen_at(-1, 0.1, 60)) is None


def test_two_windows_in_a_row_warn_once():
    alarms = Alarms()
    low, fine = chosen_at(-0.5, 0.1), chosen_at(0.0, 0.1)
    assert [len(alarms.look(step, seen)) for step, seen in enumerate([low, fine, low, low, low, low])] == [
        0,
        0,
        0,
        1,
        0,
        0,
    ]
    assert "step 3:" in alarms.said[0] and "sft_weight=1.0" in alarms.said[0] and "65% higher" in alarms.said[0]


def test_without_a_reference_the_first_window_is_the_start():
    """The variance is that of both windows: s²/(n − 1) each."""
    rule = Displacement()

    def window(mean):
        ratios = chosen_at(mean, 0.2).log_ratios
        return of_pairs(ratios, logps=ratios)

    edge = -FALL - 3 * 0.2 * np.sqrt(2 / (WINDOW - 1))
    assert rule.finding(window(-2.0)) == {}
    assert rule.finding(window(-2.0 + edge + 1e-6)) == {}
    assert rule.finding(window(-2.0 + edge - 1e-6))["fall"] == pytest.approx(-edge, abs=1e-5)


def margins_of(intercept, slope, noise, seed=0):
    """Return pairs with margin = intercept + slope·(difference in length) + noise; the mean difference is 5."""
    rng = np.random.default_rng(seed)
    rejected = rng.integers(10, 40, WINDOW).astype(float)
    chosen = rejected + rng.integers(1, 10, WINDOW)
    margins = intercept + slope * (chosen - rejected) + rng.normal(0, noise, WINDOW)
    ratios = np.stack([margins / chosen, np.zeros(WINDOW)], 1)
    return of_pairs(ratios, np.stack([chosen, rejected], 1))


def test_margins_that_length_explains_are_found():
    found = LengthAlone().finding(margins_of(0.0, 0.5, 0.3))
    assert found["explained"] > 0.8 and abs(found["intercept"]) < 3 * found["error"]


@pytest.mark.parametrize(
    ("intercept", "slope", "noise"),
    [(2.0, 0.5, 0.3), (2.0, 0.0, 1.0), (0.0, 0.5, 5.0), (0.0, 0.0, 1.0), (0.0, -0.5, 0.3)],
    ids=["also at equal length", "not by length", "little explained", "no margin", "margins shrink"],
)
def test_other_margins_are_left_alone(intercept, slope, noise):
    assert LengthAlone().finding(margins_of(intercept, slope, noise)) == {}


def test_the_line_is_that_of_least_squares():
    """The regression equals NumPy's solver, including the covariance of its coefficients."""
    seen = margins_of(0.05, 0.5, 0.3, seed=3)
    found = LengthAlone().finding(seen)
    (_, intercept), covariance = np.polyfit(seen.length_differences, seen.margins, 1, cov=True)
    assert found["intercept"] == pytest.approx(intercept)
    assert found["error"] == pytest.approx(np.sqrt(covariance[1, 1]))
    assert found["explained"] == pytest.approx(np.corrcoef(seen.length_differences, seen.margins)[0, 1] ** 2)


def made_to_displace(count):
    """Chosen responses are 3 tokens and rejected ones are 12 tokens, drawn from the same three tokens. Lowering the
    rejected sum by lowering these tokens therefore gains four times what it costs.
    """
    rows, rng = random_rows(count, seed=5, longest=10), np.random.default_rng(0)
    for row in rows:
        row["response_ids"] = [rng.integers(7, 10, size).tolist() for size in (3, 12)]
        row["scored_masks"] = [[1] * 3, [1] * 12]
    return Dataset.from_list(rows)


def run(folder, caplog, **settings):
    torch.manual_seed(0)
    model, options = with_lora(tiny_model()), {"per_device_train_batch_size": 8, "reference": "adapter_off"}
    options |= {"train_dataset": made_to_displace(400), "seed": 1, "logging_steps": 5}
    trainer = make_trainer(folder, model, **{**options, **settings})
    with caplog.at_level(logging.WARNING):
        trainer.train()
    return [text for text in trainer.record.alarms.said if "less likely" in text], caplog.text, trainer


def test_a_run_that_displaces_says_so_once_and_with_the_cure_it_does_not(tmp_path, caplog):
    """The same run with the negative log-likelihood of chosen responses added to the loss logs no warning."""
    said, log, trainer = run(tmp_path, caplog, learning_rate=3e-3)
    assert len(said) == 1 and log.count(said[0]) == 1 and "docs/displacement.md" in said[0]
    assert logged(trainer, "log_ratios/chosen")[-1] < -FALL
    caplog.clear()
    said, log, trainer = run(tmp_path, caplog, learning_rate=3e-3, sft_weight=1.0)
    assert not said and "less likely" not in log
    assert logged(trainer, "log_ratios/chosen")[-1] > 0


def test_a_healthy_run_says_nothing(tmp_path, caplog):
    """Random pairs, in a long run, log no warning."""
    said, log, trainer = run(tmp_path, caplog, learning_rate=1e-4, train_dataset=pairs(400))
    assert not said and "less likely" not in log and logged(trainer, "log_ratios/accuracies")
