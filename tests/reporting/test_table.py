"""The table before → after and the interval on its shares."""

import io

import pytest
from rich.console import Console

from hf_prefopt.reporting.table import evaluation_table, wilson_interval


def render(table) -> str:
    out = io.StringIO()
    Console(width=100, file=out).print(table)
    return out.getvalue()


def test_wilson_interval_equals_the_textbook_value():
    """p = 1/2, n = 96, z² = 3.8415: the centre stays 1/2, the half-width is z/(2·√(n + z²)) = 1.95996/(2·9.99207)."""
    assert wilson_interval(0.5, 96) == pytest.approx((0.5 - 0.098076, 0.5 + 0.098076), abs=1e-6)


def test_wilson_interval_is_symmetric_and_never_leaves_zero_and_one():
    low, high = wilson_interval(0.0, 10)
    assert low == 0.0 and 0.0 < high < 0.3
    assert wilson_interval(1.0, 10) == pytest.approx((1 - high, 1.0))


@pytest.mark.parametrize(("share", "n"), [(1.2, 10), (-0.1, 10), (0.5, 0)])
def test_wilson_interval_refuses_what_is_no_share(share, n):
    with pytest.raises(ValueError, match="share"):
        wilson_interval(share, n)


def test_table_shows_both_evaluations_and_the_interval():
    before = {"eval_loss": 0.693147, "eval_rewards/accuracies": 0.5, "eval_rewards/margins": 0.0}
    after = {"eval_loss": 0.61, "eval_rewards/accuracies": 0.69, "eval_rewards/margins": 0.412}
    text = render(evaluation_table(before, after, examples=96))
    assert "0.6931" in text and "0.6100" in text
    assert "0.690 [0.592, 0.774]" in text
    assert "+0.4120" in text


def test_an_unknown_number_of_examples_leaves_the_interval_out():
    after = {"eval_rewards/accuracies": 0.69, "eval_gsm8k/exact_match": 0.05, "eval_gsm8k/problems": 200}
    text = render(evaluation_table(None, after, examples=None))
    assert "Evaluation on held-out examples" in text and "0.690 " in text and "0.690 [" not in text
    assert "0.050 [0.027, 0.090]" in text


def test_table_without_an_evaluation_before_has_one_column_of_numbers():
    text = render(evaluation_table(None, {"eval_loss": 0.61}, examples=96))
    assert "before" not in text and "0.6100" in text


def test_a_metric_that_only_the_later_evaluation_has_is_shown_with_its_own_sample_size():
    after = {"eval_gsm8k/exact_match": 0.05, "eval_gsm8k/problems": 200}
    text = render(evaluation_table({}, after, examples=96))
    assert "–" in text and "0.050 [0.027, 0.090]" in text
