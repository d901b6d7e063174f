"""The confidence interval of an accuracy, for examples that may share prompts."""

import numpy as np
import pytest

from hf_prefopt.reporting.intervals import accuracy_of, effective_size, wilson_interval


def test_wilson_interval_equals_the_textbook_value():
    """p = 1/2, n = 96, z² = 3.8415: the center is 1/2, and the half-width is z/(2·√(n + z²)) = 1.95996/(2·9.99207)."""
    assert wilson_interval(0.5, 96) == pytest.approx((0.5 - 0.098076, 0.5 + 0.098076), abs=1e-6)


def test_wilson_interval_is_symmetric_and_never_leaves_zero_and_one():
    low, high = wilson_interval(0.0, 10)
    assert low == 0.0 and 0.0 < high < 0.3
    assert wilson_interval(1.0, 10) == pytest.approx((1 - high, 1.0))


@pytest.mark.parametrize(("share", "n"), [(1.2, 10), (-0.1, 10), (0.5, 0)])
def test_wilson_interval_refuses_what_is_no_share(share, n):
    with pytest.raises(ValueError, match="share"):
        wilson_interval(share, n)


def test_a_prompt_of_its_own_for_each_example_is_the_plain_interval():
    correct = np.array([1.0, 0, 1, 1, 0.5, 1, 0, 1])
    found = accuracy_of(correct, np.arange(8))
    assert (found.low, found.high) == pytest.approx(wilson_interval(correct.mean(), 8))
    assert (found.examples, found.prompts) == (8, 8)


@pytest.mark.parametrize("copies", [2, 5])
def test_copies_of_an_example_tell_nothing_new(copies):
    """G prompts with m equal examples each: n_eff = n/deff = (G − 1)·n/(n − 1), about G and not m·G.

    Σ_g (Σ_i e)² = m²·Σ_g e_g², Σ_i e² = m·Σ_g e_g², so deff = m·[G/(G−1)]/[n/(n−1)].
    """
    values = np.array([1.0, 0, 1, 1, 0, 1, 1, 0, 1, 0])
    groups, n = len(values), len(values) * copies
    found = effective_size(np.repeat(values, copies), np.repeat(np.arange(groups), copies))
    assert found == pytest.approx((groups - 1) * n / (n - 1))


def test_the_interval_is_that_of_a_bootstrap_over_prompts():
    """300 prompts have 1 to 6 examples, whose accuracy differs by prompt: the half-widths agree within 10 %.

    With 2,000 resamples of whole prompts, the standard deviation has an error of 1/√4000 = 1.6 %.
    """
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 7, 300)
    clusters = np.repeat(np.arange(300), sizes)
    correct = (rng.random(len(clusters)) < np.repeat(rng.beta(1, 0.7, 300), sizes)).astype(float)
    found = accuracy_of(correct, clusters)
    sums = np.bincount(clusters, weights=correct)
    draws = rng.integers(0, 300, (2000, 300))
    means = sums[draws].sum(1) / sizes[draws].sum(1)
    assert found.high - found.low == pytest.approx(2 * 1.96 * means.std(), rel=0.1)
    low, high = wilson_interval(correct.mean(), len(correct))
    assert found.high - found.low > 1.3 * (high - low)


def test_where_all_are_right_prompts_count():
    assert accuracy_of(np.ones(40), np.repeat(np.arange(4), 10)).low == pytest.approx(wilson_interval(1.0, 4)[0])


def test_examples_that_compare_nothing_are_left_out():
    found = accuracy_of(np.array([1.0, np.nan, 0.0]), ["a", "b", "c"])
    assert (found.value, found.examples, found.prompts) == (0.5, 2, 2)
    assert accuracy_of(np.array([np.nan]), [0]) is None
    assert str(accuracy_of(np.ones(1), [0])) == "1.000 [0.207, 1.000]"  # 1/(1 + z²)
