"""Losses on numbers that can be computed by hand."""

import math

import pytest
import torch

from hf_prefopt import register_loss
from hf_prefopt.losses import (
    cpo_loss,
    dpo_loss,
    dpo_norm_loss,
    get_loss,
    hinge_loss,
    ipo_loss,
    kto_pair_loss,
    list_losses,
    orpo_loss,
    reference_free_dpo_loss,
    sft_loss,
    simpo_loss,
    wpo_loss,
)
from hf_prefopt.losses.base import log1mexp


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


# One pair: r_w = −3 + 5 = 2, r_l = −4 + 3 = −1, so h = 3. Lengths 2 and 4.
PAIR = (vector(-3.0), vector(-4.0), vector(-5.0), vector(-3.0))
LENGTHS = (vector(2.0), vector(4.0))


def test_dpo_is_log_two_at_the_reference():
    """h = 0, so the loss is −log σ(0) = log 2 whatever beta is."""
    same = vector(-7.0, -9.0)
    assert dpo_loss(same, same, same, same, beta=3.0).losses.tolist() == pytest.approx([math.log(2)] * 2, rel=1e-15)


def test_dpo_by_hand():
    """β = 1/3: z = 1, log(1 + e⁻¹) = 0.3132617; rewards 2/3 and −1/3."""
    output = dpo_loss(*PAIR, beta=1 / 3)
    assert output.losses.item() == pytest.approx(0.3132616875182228, rel=1e-12)
    assert output.rewards[0].tolist() == pytest.approx([2 / 3, -1 / 3])


def test_cdpo_by_hand():
    """ε = 0.1 at z = 1: 0.9 · 0.3132617 + 0.1 · (0.3132617 + 1) = 0.4132617, since ℓ(−z) = ℓ(z) + z."""
    assert dpo_loss(*PAIR, beta=1 / 3, label_smoothing=0.1).losses.item() == pytest.approx(0.4132616875182228)


def test_dpo_without_a_reference():
    """s_w − s_l = 1, β = 1: ℓ(1); token log-probs [B, T] are summed first; the plain function agrees."""
    expected = 0.3132616875182228
    assert dpo_loss(PAIR[0], PAIR[1], beta=1.0).losses.item() == pytest.approx(expected)
    assert reference_free_dpo_loss(PAIR[0], PAIR[1], 1.0).losses.item() == pytest.approx(expected)
    tokens = torch.tensor([[-1.0, -2.0]], dtype=torch.float64), torch.tensor([[-1.5, -2.5, 0.0]], dtype=torch.float64)
    assert reference_free_dpo_loss(*tokens, 1.0).losses.item() == pytest.approx(expected)


def test_half_a_reference_is_refused():
    with pytest.raises(ValueError, match="ref_chosen_logps given without ref_rejected_logps"):
        dpo_loss(PAIR[0], PAIR[1], PAIR[2])


def test_dpo_norm_by_hand():
    """r̄_w = 2/2 = 1, r̄_l = −1/4, β = 4/5: z = 1."""
    output = dpo_norm_loss(PAIR[0], PAIR[1], *LENGTHS, *PAIR[2:], beta=0.8)
    assert output.losses.item() == pytest.approx(0.3132616875182228)


def test_ipo_by_hand_and_its_turning_point():
    """β = 1/2: target 1. Averaged: 1.25 − 1 = 0.25, squared 0.0625. Summed: 3 − 1 = 2, squared 4.

    Beyond the target the loss grows again: its derivative in s_w there is 2 · 0.25 / 2 = +0.25.
    """
    chosen = PAIR[0].clone().requires_grad_()
    averaged = ipo_loss(chosen, PAIR[1], *LENGTHS, *PAIR[2:], beta=0.5)
    averaged.losses.sum().backward()
    assert averaged.losses.item() == pytest.approx(0.0625)
    assert chosen.grad.item() == pytest.approx(0.25)
    assert ipo_loss(*PAIR[:2], *LENGTHS, *PAIR[2:], beta=0.5, length_normalize=False).losses.item() == pytest.approx(
        4.0
    )


def test_hinge_by_hand():
    """1 − 0.1 · 3 = 0.7; with β = 1, the margin 3 is larger than 1, and the loss is 0."""
    assert hinge_loss(*PAIR, beta=0.1).losses.item() == pytest.approx(0.7)
    assert hinge_loss(*PAIR, beta=1.0).losses.item() == 0


def test_kto_pair_by_hand():
    """Two pairs, r_w = (2, 4), r_l = (−1, 3): z_w = 3, z_l = 1, β = 1.

    Pair 1: ½[1−σ(2−1) + 1−σ(3+1)] = ½[0.2689414 + 0.0179862]; pair 2: ½[1−σ(4−1) + 1−σ(3−3)] = ½[0.0474259 + 0.5].
    """
    zero = vector(0.0, 0.0)
    output = kto_pair_loss(vector(2.0, 4.0), vector(-1.0, 3.0), zero, zero, beta=1.0)
    assert output.losses.tolist() == pytest.approx([0.14346381, 0.27371293], rel=1e-6)


def test_kto_pair_keeps_its_baseline_out_of_the_gradient():
    """With r_w = r_l = (1, 1), z = 1: dL/dr_w = −½ σ'(0) = −1/8 for each pair; differentiating z would change it."""
    policy = vector(1.0, 1.0).requires_grad_()
    zero = vector(0.0, 0.0)
    kto_pair_loss(policy, vector(1.0, 1.0), zero, zero, beta=1.0).losses.sum().backward()
    assert policy.grad.tolist() == pytest.approx([-0.125, -0.125])


def test_simpo_by_hand_and_its_two_margins():
    """s̄ = −1.5 and −1; β = 2, γ = 1: z = 2 · (−0.5) − 1 = −2, ℓ = 2.1269280. γ/β = 0.5 says the same."""
    for margin in ({}, {"gamma": 1.0}, {"gamma_beta_ratio": 0.5}):
        assert simpo_loss(*PAIR[:2], *LENGTHS, **margin).losses.item() == pytest.approx(2.1269280110429727)
    with pytest.raises(ValueError, match="pass one of them"):
        simpo_loss(*PAIR[:2], *LENGTHS, gamma=1.0, gamma_beta_ratio=0.5)


def test_cpo_by_hand():
    """β = 1: ℓ(1) + NLL = 0.3132617 + 3/2; its two parts are named."""
    output = cpo_loss(*PAIR[:2], LENGTHS[0], beta=1.0)
    assert output.losses.item() == pytest.approx(1.8132616875182228)
    assert output.components["nll"].item() == pytest.approx(1.5)


def test_orpo_by_hand():
    """p_w = ½ (s̄ = −log 2), odds 1; p_l = ¼, odds 1/3; ratio 3: ℓ(log 3) = log(4/3); NLL = log 2; β = 1."""
    chosen, rejected = vector(2 * math.log(0.5)), vector(4 * math.log(0.25))
    output = orpo_loss(chosen, rejected, *LENGTHS, beta=1.0)
    assert output.losses.item() == pytest.approx(math.log(2) + math.log(4 / 3))


def test_orpo_survives_a_certain_response():
    """At s̄ = −1e-6 (fp32), log1p(−exp(s̄)) is inaccurate or −inf, but log odds =
    −log 1e-6 = 13.8155; it is finite at 0.
    """
    chosen = torch.tensor([-2e-6, 0.0], requires_grad=True)
    output = orpo_loss(chosen, torch.tensor([-4.0, -4.0]), torch.tensor([2, 2]), torch.tensor([4, 4]))
    output.losses.sum().backward()
    expected = 13.815510 - (-1 - math.log(1 - math.exp(-1)))
    assert output.components["log_odds_ratio"][0].item() == pytest.approx(expected, rel=1e-5)
    assert output.losses.isfinite().all() and chosen.grad.isfinite().all()


def test_log1mexp_is_accurate_at_both_ends():
    """log(1 − e^x): x = −1e-10 gives log 1e-10; x = −50 gives −e⁻⁵⁰."""
    values = log1mexp(torch.tensor([-1e-10, -50.0], dtype=torch.float64))
    assert values.tolist() == pytest.approx([math.log(1e-10), -math.exp(-50)], rel=1e-9)


def test_wpo_weight_is_clamped_and_detached():
    """Weights min(1, e^(−0.5)·e^(−0.5)) = e⁻¹ and min(1, e^0.4) = 1; no gradient reaches the alignment."""
    policy, other = vector(-3.0, -3.0), vector(-4.0, -4.0)
    alignment = vector(-0.5, 0.2).requires_grad_()
    plain = dpo_loss(policy, other, beta=1.0).losses
    output = wpo_loss(policy.requires_grad_(), other, alignment, alignment, beta=1.0)
    output.losses.sum().backward()
    assert output.losses.tolist() == pytest.approx([plain[0].item() * math.exp(-1), plain[1].item()])
    assert alignment.grad is None


def test_sft_averages_each_example_by_its_own_length():
    """−(−3)/2 = 1.5 and −(−8)/4 = 2: each response is divided by its own length, so batch splits have no effect."""
    assert sft_loss(vector(-3.0, -8.0), vector(2.0, 4.0)).losses.tolist() == [1.5, 2.0]


def test_an_empty_response_divides_by_one():
    """Length 0 counts as 1: no 0/0."""
    assert sft_loss(vector(0.0), vector(0.0)).losses.tolist() == [0.0]


def test_a_users_loss_gets_a_name_aliases_and_rewards():
    """A function that only returns losses is registered in one line; its rewards are β·(s − s_ref)."""

    @register_loss("test_squared", aliases=("test_sq",))
    def squared_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.5):
        """The squared margin."""
        return (beta * (policy_chosen_logps - policy_rejected_logps)).square()

    try:
        spec = get_loss("test_sq")
        output = spec(**dict(zip(spec.inputs, PAIR, strict=True)))
        assert (output.losses.item(), output.rewards.tolist()) == (0.25, [[1.0, -0.5]])
        assert spec.needs_reference_model and spec.description == "The squared margin."
        with pytest.raises(ValueError, match="already registered"):
            register_loss("test_sq")(squared_loss)
    finally:
        from hf_prefopt.losses import registry

        registry._LOSSES.pop("test_squared"), registry._ALIASES.pop("test_sq")


def test_a_loss_with_an_unknown_input_is_refused():
    with pytest.raises(ValueError, match="policy_chosen_logp is neither a known input"):
        register_loss("test_bad")(lambda policy_chosen_logp: policy_chosen_logp)


def test_names_and_aliases():
    """Common names from other libraries are aliases of the right losses."""
    assert get_loss("sigmoid").name == "dpo" and get_loss("sigmoid_norm").name == "dpo_norm"
    assert "dpo" in list_losses() and "sigmoid" not in list_losses()
    with pytest.raises(ValueError, match="did you mean simpo"):
        get_loss("simp0")
