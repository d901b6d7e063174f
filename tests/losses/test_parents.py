"""A loss with neutral settings equals the loss that it generalizes."""

import math

import pytest
import torch

from hf_prefopt.kinds.made_up import made_up_inputs
from hf_prefopt.losses import get_loss
from hf_prefopt.testing import call

BETA = 0.3


def losses(name, inputs, **params):
    return call(name, inputs, **params).losses


@pytest.mark.parametrize(
    ("name", "neutral", "parent", "settings", "factor"),
    [
        ("robust", {"label_smoothing": 0.0}, "dpo", {}, 1.0),
        ("gpo", {"function": "logistic"}, "dpo", {}, 1.0),
        ("gpo", {"function": "hinge"}, "hinge", {}, 1.0),
        # (βh − 1)² = β²(h − 1/β)², which is IPO's (h − 1/(2β′))² at β′ = β/2.
        ("gpo", {"function": "square"}, "ipo", {"beta": BETA / 2, "length_normalize": False}, BETA**2),
        ("focal_po", {"gamma": 0.0}, "dpo", {}, 1.0),
        ("focal_po", {"gamma": 0.0, "detach_weight": True}, "dpo", {}, 1.0),
        ("dpop", {"lambda_coef": 0.0}, "dpo", {}, 1.0),
        ("r_dpo", {"alpha": 0.0}, "dpo", {}, 1.0),
        ("dpo_shift", {"lambda_coef": 1.0}, "dpo", {}, 1.0),
        ("cal_dpo", {"calibration_weight": 0.0}, "dpo", {"beta": 1.0}, 1.0),
        ("alphapo", {"alpha": 0.0, "gamma": 0.2}, "simpo", {"gamma": 0.2}, 1.0),
        ("alphapo", {"alpha": 1e-12, "gamma": 0.2}, "simpo", {"gamma": 0.2}, 1.0),
        ("alphapo", {"alpha": -1e-12, "gamma": 0.2}, "simpo", {"gamma": 0.2}, 1.0),
    ],
)
def test_neutral_setting_equals_its_parent(name, neutral, parent, settings, factor):
    inputs = made_up_inputs()
    own = losses(name, inputs, **{"beta": BETA} | neutral)
    torch.testing.assert_close(own, factor * losses(parent, inputs, **{"beta": BETA} | settings), rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "dr_dpo"])
def test_a_batch_of_one_pair_is_dpo(name):
    """A single pair has nothing to sort or to weight."""
    inputs = made_up_inputs(pairs=1)
    torch.testing.assert_close(losses(name, inputs, beta=BETA), losses("dpo", inputs, beta=BETA))


def test_dr_dpo_with_a_large_beta_prime_is_dpo():
    """−β′ log(1 − mean ℓ/β′ + …) → mean ℓ; the next term is −var(ℓ)/(2β′)."""
    inputs = made_up_inputs()
    value = losses("dr_dpo", inputs, beta=BETA, beta_prime=1e6)[0]
    torch.testing.assert_close(value, losses("dpo", inputs, beta=BETA).mean(), rtol=1e-6, atol=0)


def test_slic_hf_without_its_nll_is_the_hinge_without_a_reference():
    """δ = 1, β = 1: max(0, 1 − (s_w − s_l))."""
    inputs = made_up_inputs()
    no_reference = {key: value for key, value in inputs.items() if not key.startswith("ref")}
    torch.testing.assert_close(losses("slic_hf", inputs, lambda_coef=0.0), losses("hinge", no_reference, beta=1.0))


def test_cal_dpo_is_dpo_and_half_of_sppo_hard():
    """Its calibration has SPPO's targets: ℓ(h) + ½·sppo_hard."""
    inputs = made_up_inputs()
    expected = losses("dpo", inputs, beta=1.0) + 0.5 * losses("sppo_hard", inputs, beta=BETA)
    torch.testing.assert_close(losses("cal_dpo", inputs, beta=BETA), expected)


def test_chi_po_near_the_reference_is_dpo_at_twice_beta():
    """φ(r) = r + e^r = 1 + 2r + O(r²), and the constant cancels."""
    inputs = made_up_inputs()
    for side in ("chosen", "rejected"):
        reference = inputs[f"ref_{side}_logps"]
        inputs[f"policy_{side}_logps"] = reference + 1e-5 * (inputs[f"policy_{side}_logps"] - reference)
    chi_po, dpo = losses("chi_po", inputs, beta=BETA), losses("dpo", inputs, beta=2 * BETA)
    torch.testing.assert_close(chi_po - math.log(2), dpo - math.log(2), rtol=1e-3, atol=1e-10)


def test_discopop_is_dpo_on_pairs_ranked_far_wrong():
    """z = −2, τ = 0.05: m = σ(−40) ≈ 4e-18 leaves ℓ(z)."""
    chosen, zero = torch.full((1,), -2.0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    discopop, dpo = (get_loss(name).function(chosen, zero, zero, zero, beta=1.0).losses for name in ("discopop", "dpo"))
    torch.testing.assert_close(discopop, dpo, rtol=1e-15, atol=0)


def test_repo_is_simpo_with_a_large_beta():
    """ℓ(β(M − γ))/β → max(0, γ − M)."""
    inputs = made_up_inputs()
    simpo = losses("simpo", inputs, beta=1e6, gamma_beta_ratio=0.5) / 1e6
    torch.testing.assert_close(losses("repo", inputs), simpo, rtol=0, atol=1e-6)


def test_apo_zero_is_twice_kto_pair_with_baselines_of_zero():
    """With both mean log-ratios below 0, KTO's baselines are 0: ½[1 − σ(βr_w) + σ(βr_l)]."""
    inputs = made_up_inputs()
    for side in ("chosen", "rejected"):
        inputs[f"policy_{side}_logps"] = inputs[f"policy_{side}_logps"] - 10
    torch.testing.assert_close(losses("apo_zero", inputs), 2 * losses("kto_pair", inputs))


@pytest.mark.parametrize("name", ["robust", "exo_pair", "discopop", "gpo", "cauchy", "focal_po", "r_dpo", "dr_dpo"])
def test_functions_of_the_margin_can_do_without_a_reference(name):
    """Without a reference, the log-ratio is the log-prob, as for a reference of zeros."""
    inputs = made_up_inputs()
    no_reference = {key: value for key, value in inputs.items() if not key.startswith("ref")}
    zeros = {key: torch.zeros_like(value) if key.startswith("ref") else value for key, value in inputs.items()}
    assert get_loss(name).can_be_reference_free
    torch.testing.assert_close(losses(name, no_reference), losses(name, zeros), rtol=0, atol=0)
