"""The other losses of pairs, on numbers that can be computed by hand.

ℓ(1) = log(1 + e⁻¹) = 0.3132617, ℓ(−z) = ℓ(z) + z, and σ(1) = 0.7310586 are used throughout.
"""

import math

import pytest
import torch

from hf_prefopt.kinds.made_up import made_up_inputs
from hf_prefopt.losses import get_loss, slic_hf_loss
from hf_prefopt.losses.base import exp_to_tangent, expm1_to_tangent
from tests.losses import numpy_reference
from tests.losses.pairs import by_log_ratios, vector

L1 = 0.3132616875182228


def value(*arguments, **params):
    return by_log_ratios(*arguments, **params).losses.item()


def test_robust_by_hand():
    """z = 1, ε = 0.2: ((1−ε)ℓ(1) − ε(ℓ(1) + 1))/(1 − 2ε) = ℓ(1) − 0.2/0.6: it is negative, which is possible for an
    unbiased loss."""
    assert value("robust", 2.0, -1.0, beta=1 / 3, label_smoothing=0.2) == pytest.approx(L1 - 1 / 3)


def test_robust_is_unbiased():
    """With a fraction ε of the labels flipped, its mean is DPO's on clean ones: (1−ε)·robust(h) + ε·robust(−h)."""
    kept, flipped = (value("robust", h, 0.0, beta=0.5, label_smoothing=0.2) for h in (3.0, -3.0))
    assert 0.8 * kept + 0.2 * flipped == pytest.approx(value("dpo", 3.0, 0.0, beta=0.5))


def test_exo_pair_by_hand():
    """z = log 2: q = (2/3, 1/3); p = (3/4, 1/4): 2/3 log(8/9) + 1/3 log(4/3). With ε = 1/3, p = q and the loss is 0."""
    expected = 2 / 3 * math.log(8 / 9) + 1 / 3 * math.log(4 / 3)
    assert value("exo_pair", math.log(2), 0.0, beta=1.0, label_smoothing=0.25) == pytest.approx(expected)
    assert value("exo_pair", math.log(2), 0.0, beta=1.0, label_smoothing=1 / 3) == pytest.approx(0, abs=1e-15)


def test_nca_pair_by_hand():
    """βr = (1, −1): ℓ(1) + ½ℓ(−1) + ½ℓ(1) = 2ℓ(1) + ½, since ℓ(−1) = ℓ(1) + 1."""
    assert value("nca_pair", 2.0, -2.0, beta=0.5) == pytest.approx(2 * L1 + 0.5)


def test_sppo_hard_by_hand():
    """β = ½: targets 1 and −1; r = (2, −1): (2 − 1)² + 0² = 1, with rewards (1, −½)."""
    output = by_log_ratios("sppo_hard", 2.0, -1.0, beta=0.5)
    assert (output.losses.item(), output.rewards.tolist()) == (1.0, [[1.0, -0.5]])


def test_cal_dpo_by_hand():
    """β = ½, r = (1, 0), h = 1: ℓ(1) + ½[(1 − 1)² + (0 + 1)²]: the contrast is not scaled by β. The paper's w = 1."""
    assert value("cal_dpo", 1.0, 0.0, beta=0.5) == pytest.approx(L1 + 0.5)
    assert value("cal_dpo", 1.0, 0.0, beta=0.5, calibration_weight=1.0) == pytest.approx(L1 + 1)


def test_apo_by_hand():
    """βr = (1, −1): zero 1 − σ(1) + σ(−1) = 2σ(−1); down σ(1) + 1 − σ(2) = σ(1) + σ(−2)."""
    assert value("apo_zero", 2.0, -2.0, beta=0.5) == pytest.approx(2 * 0.2689414213699951)
    assert value("apo_down", 2.0, -2.0, beta=0.5) == pytest.approx(0.7310585786300049 + 0.11920292202211755)


def test_discopop_by_hand():
    """z = 1, τ = 1: m = σ(1), m·e⁻¹ = σ(−1), so (1 − m)ℓ(1) + m·e⁻¹ = σ(−1)(ℓ(1) + 1)."""
    assert value("discopop", 2.0, 0.0, beta=0.5, discopop_tau=1.0) == pytest.approx(0.2689414213699951 * (L1 + 1))


@pytest.mark.parametrize(
    ("function", "at_minus_one", "at_two"),
    [
        ("logistic", L1 + 1, math.log(1 + math.exp(-2))),
        ("hinge", 2.0, 0.0),
        ("square", 4.0, 1.0),
        ("exponential", math.e, math.exp(-2)),
        ("truncated_square", 4.0, 0.0),
        ("savage", (math.e / (1 + math.e)) ** 2, 1 / (1 + math.exp(2)) ** 2),
    ],
)
def test_gpo_by_hand(function, at_minus_one, at_two):
    """z = −1 and 2. Savage: 1/(1 + e⁻¹)² = (e/(1 + e))²."""
    assert value("gpo", -2.0, 0.0, beta=0.5, function=function) == pytest.approx(at_minus_one)
    assert value("gpo", 4.0, 0.0, beta=0.5, function=function) == pytest.approx(at_two)


def test_cauchy_by_hand():
    """atan(±1) = ±π/4: probabilities ¾ and ¼. For large x, P(−x) → 1/(πx): −log P = log(π·10⁶), also in fp32."""
    assert value("cauchy", 2.0, 0.0, beta=0.5) == pytest.approx(-math.log(0.75))
    assert value("cauchy", -2.0, 0.0, beta=0.5) == pytest.approx(-math.log(0.25))
    far = torch.tensor([-1e6])
    assert by_log_ratios("cauchy", far, 0 * far, beta=1.0).losses.item() == pytest.approx(math.log(math.pi * 1e6))


def test_focal_po_by_hand():
    """βh = −log 3, p = ¼, γ = ½: −√¼ · log ¼ = log 2."""
    assert value("focal_po", -math.log(3), 0.0, beta=1.0, gamma=0.5) == pytest.approx(math.log(2))


def test_dpop_by_hand():
    """r = (−1, 2): h = −3, penalty λ · 1 = 2, β = 0.2: ℓ(0.2 · −5) = ℓ(−1). A chosen response that rose costs none."""
    output = by_log_ratios("dpop", -1.0, 2.0, beta=0.2, lambda_coef=2.0)
    assert output.losses.item() == pytest.approx(L1 + 1)
    assert output.rewards[0].tolist() == pytest.approx([-0.2, 0.4])
    assert output.components["penalty"].item() == pytest.approx(0.4)
    assert value("dpop", 2.0, -1.0, beta=1 / 3) == pytest.approx(L1)


def test_r_dpo_by_hand():
    """h = 3, β = 2/3, α = ½, lengths 2 and 4: ℓ(2 + ½(2 − 4)) = ℓ(1); rewards βr + α|y| = 4/3 + 1 and −2/3 + 2."""
    output = by_log_ratios("r_dpo", 2.0, -1.0, lengths=(2.0, 4.0), beta=2 / 3, alpha=0.5)
    assert output.losses.item() == pytest.approx(L1)
    assert output.rewards[0].tolist() == pytest.approx([7 / 3, 4 / 3])


@pytest.mark.parametrize("progress", [0.0, 0.25, 0.7, 1.0])
def test_dpo_shift_along_its_line(progress):
    """λ from 0.5 to 1: the value is that of a constant λ = ½ + ½·progress, and NumPy's."""
    inputs = made_up_inputs()
    spec = get_loss("dpo_shift")
    given = {key: inputs[key] for key in spec.inputs}
    output = spec(**given, lambda_coef=0.5, lambda_end=1.0, progress=progress)
    constant = spec(**given, lambda_coef=0.5 + 0.5 * progress, progress=1 - progress)
    torch.testing.assert_close(output.losses, constant.losses, rtol=1e-13, atol=0)
    expected, _ = numpy_reference.dpo_shift(
        *(inputs[key].numpy() for key in spec.inputs), lambda_coef=0.5, lambda_end=1.0, progress=progress
    )
    torch.testing.assert_close(output.losses, torch.tensor(expected), rtol=1e-12, atol=0)
    assert output.components["lambda"].tolist() == pytest.approx([0.5 + 0.5 * progress] * 5)


def test_dpo_shift_by_hand():
    """r = (2, −1), λ = ½: 2 + ½ = 2.5, β = 0.4: ℓ(1)."""
    assert value("dpo_shift", 2.0, -1.0, beta=0.4, lambda_coef=0.5) == pytest.approx(L1)


def test_chi_po_by_hand():
    """r = (log 2, 0), β = 1: φ = 2 + log 2 and 1, so ℓ(1 + log 2) = log(1 + 1/(2e)); clipped at R = ½, ℓ(1)."""
    output = by_log_ratios("chi_po", math.log(2), 0.0, beta=1.0)
    assert output.losses.item() == pytest.approx(math.log(1 + 1 / (2 * math.e)))
    assert output.rewards[0].tolist() == pytest.approx([2 + math.log(2), 1.0])
    assert value("chi_po", math.log(2), 0.0, beta=1.0, reward_bound=0.5) == pytest.approx(L1)


def test_aot_by_hand():
    """Policy margins (3, 1), reference margins (0, 2): sorted (1, 3) against (0, 2), 1 each. DPO would see 3 and −1."""
    losses = get_loss("aot")(
        policy_chosen_logps=vector(-1.0, -2.0),
        policy_rejected_logps=vector(-4.0, -3.0),
        ref_chosen_logps=vector(-5.0, -5.0),
        ref_rejected_logps=vector(-5.0, -7.0),
        beta=1.0,
    ).losses
    assert losses.tolist() == pytest.approx([L1, L1])


def test_aot_gives_each_pair_the_loss_of_its_own_rank():
    """Policy margins (4, 1), reference margins (0, 2): 4 − 2 = 2 for the first pair, 1 − 0 = 1 for the second."""
    zero = vector(0.0, 0.0)
    losses = get_loss("aot").function(vector(4.0, 1.0), zero, vector(0.0, 2.0), zero, beta=1.0).losses
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-2)), L1])


def test_aot_unpaired_by_hand():
    """r_w = (2, 0), r_l = (−1, 1): 2 − 1 and 0 − (−1): 1 each, where the pairs' own h are 3 and −1."""
    losses = by_log_ratios("aot_unpaired", vector(2.0, 0.0), vector(-1.0, 1.0), beta=1.0).losses
    assert losses.tolist() == pytest.approx([L1, L1])


def test_dr_dpo_by_hand():
    """z = 0 and log 3, β′ = 1: e^(−ℓ) = σ(z) = ½ and ¾, so −log(5/8) for both pairs."""
    output = by_log_ratios("dr_dpo", vector(0.0, math.log(3)), vector(0.0, 0.0), beta=1.0)
    assert output.losses.tolist() == pytest.approx([math.log(8 / 5)] * 2)
    assert output.components["preference"].tolist() == pytest.approx([math.log(2), math.log(4 / 3)])


def test_dr_dpo_weighs_its_pairs_by_their_losses():
    """The same pairs: weights ½ : ¾ = 2/5, 3/5; dℓ/dz = −(1 − σ) = −½, −¼: gradients of the mean −0.2 and −0.15."""
    chosen = vector(0.0, math.log(3)).requires_grad_()
    by_log_ratios("dr_dpo", chosen, vector(0.0, 0.0), beta=1.0).loss.backward()
    assert chosen.grad.tolist() == pytest.approx([-0.2, -0.15])


def test_slic_hf_by_hand():
    """s = (−3, −4), δ = 2: 2 + 3 − 4 = 1, NLL 3, λ = 0.1: 1.3; by its length of 2, NLL 1.5: 1.15. Rewards are s."""
    inputs = vector(-3.0), vector(-4.0), vector(2.0)
    output = slic_hf_loss(*inputs, delta=2.0)
    assert (output.losses.item(), output.rewards.tolist()) == (pytest.approx(1.3), [[-3.0, -4.0]])
    assert slic_hf_loss(*inputs, delta=2.0, length_normalize=True).losses.item() == pytest.approx(1.15)


# Lengths 2 and 4; s̄_w = −log 2 and s̄_l = −log 4: tokens of probability ½ and ¼.
HALF_AND_QUARTER = {"r_w": -2 * math.log(2), "r_l": -4 * math.log(4), "lengths": (2.0, 4.0)}


def test_alphapo_by_hand():
    """α = 1: ρ = 1 − 1/p = −1 and −3; β = 1, γ = 1: ℓ(2 − 1). Its default margin is 0.04·β."""
    output = by_log_ratios("alphapo", **HALF_AND_QUARTER, alpha=1.0, beta=1.0, gamma=1.0)
    assert output.losses.item() == pytest.approx(L1)
    assert output.rewards[0].tolist() == pytest.approx([-1.0, -3.0])
    by_default = value("alphapo", **HALF_AND_QUARTER)
    assert by_default == pytest.approx(value("alphapo", **HALF_AND_QUARTER, gamma=0.1))


def test_simper_by_hand():
    """¼ − ½, with the inverse perplexities as rewards."""
    output = by_log_ratios("simper", **HALF_AND_QUARTER)
    assert output.losses.item() == pytest.approx(-0.25)
    assert output.rewards[0].tolist() == pytest.approx([0.5, 0.25])


def test_repo_by_hand():
    """s̄_w − s̄_l = log 2 = 0.693: γ = 1 leaves 1 − log 2, γ = 0.5 leaves nothing."""
    assert value("repo", **HALF_AND_QUARTER, gamma=1.0) == pytest.approx(1 - math.log(2))
    assert value("repo", **HALF_AND_QUARTER) == 0


def test_exponentials_go_on_as_their_tangent():
    """Above 20, the exponential is e²⁰(1 + x − 20), with slope e²⁰ at 20; below, it
    is e^x and e^x − 1, also for small x.
    """
    x = vector(1e-12, 2.0, 20.0, 1000.0).requires_grad_()
    exp_to_tangent(x).sum().backward()
    assert exp_to_tangent(x).tolist() == pytest.approx([1.0, math.exp(2), math.exp(20), math.exp(20) * 981])
    assert x.grad.tolist() == pytest.approx([1.0, math.exp(2), math.exp(20), math.exp(20)])
    assert expm1_to_tangent(x)[:2].tolist() == pytest.approx([1e-12, math.exp(2) - 1], rel=1e-12)
    assert expm1_to_tangent(x)[3].item() == pytest.approx(math.exp(20) * 981 - 1)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("robust", {"label_smoothing": 0.5}, r"label_smoothing=0.5 must be at least 0 and below 0.5"),
        ("exo_pair", {"label_smoothing": 0.0}, r"label_smoothing=0.0 must be above 0 and below 0.5"),
        ("discopop", {"discopop_tau": 1.5}, r"discopop_tau=1.5 must be above 0 and at most 1"),
        ("gpo", {"function": "square_root"}, "function='square_root' is not one of logistic, hinge"),
        ("focal_po", {"gamma": -0.1}, "gamma=-0.1 must be"),
        ("cal_dpo", {"calibration_weight": -1.0}, "calibration_weight=-1.0 must be"),
        ("dpop", {"lambda_coef": -1.0}, "lambda_coef=-1.0 must be"),
        ("r_dpo", {"alpha": -0.05}, "alpha=-0.05 must be"),
        ("dpo_shift", {"lambda_coef": 1.1}, r"lambda_coef=1.1 must be at least 0 and at most 1"),
        ("dpo_shift", {"lambda_end": -0.1}, r"lambda_end=-0.1 must be at least 0 and at most 1"),
        ("dpo_shift", {"progress": 1.5}, r"progress=1.5 must be at least 0 and at most 1"),
        ("chi_po", {"reward_bound": 0.0}, "reward_bound=0.0 must be"),
        ("aot", {"label_smoothing": 0.6}, "label_smoothing=0.6 must be"),
        ("dr_dpo", {"beta_prime": 0.0}, "beta_prime=0.0 must be"),
        ("slic_hf", {"delta": 0.0}, "delta=0.0 must be"),
        ("slic_hf", {"lambda_coef": -0.1}, "lambda_coef=-0.1 must be"),
        ("alphapo", {"alpha": float("inf")}, "alpha=inf must be"),
        ("alphapo", {"gamma": 0.1, "gamma_beta_ratio": 0.1}, "pass one of them"),
        ("repo", {"gamma": -0.5}, "gamma=-0.5 must be"),
    ],
)
def test_refuses_hyperparameters_out_of_range(name, params, message):
    with pytest.raises(ValueError, match=message):
        by_log_ratios(name, 1.0, 0.0, **params)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("aot_pair", "aot"),
        ("alpha_po", "alphapo"),
        ("caldpo", "cal_dpo"),
        ("chipo", "chi_po"),
        ("dpo_positive", "dpop"),
        ("drdpo", "dr_dpo"),
        ("exo_pref", "exo_pair"),
        ("focalpo", "focal_po"),
        ("lrml", "discopop"),
        ("robust_dpo", "robust"),
        ("slic", "slic_hf"),
    ],
)
def test_other_projects_names(alias, name):
    assert get_loss(alias).name == name


def test_rdpo_is_refused_as_ambiguous():
    """`rdpo` may mean robust DPO or length-regularized DPO: it raises an error, which suggests r_dpo."""
    with pytest.raises(ValueError, match="did you mean r_dpo"):
        get_loss("rdpo")
