"""Losses of tokens and of whole predictions: values by hand, special cases, and SamPO's subsets.

ℓ(1) = log(1 + e⁻¹) = 0.3132617 is used throughout.
"""

import itertools
import math

import pytest
import torch

from hf_prefopt.kinds.made_up import made_up_inputs
from hf_prefopt.losses import get_loss
from hf_prefopt.losses.token_level import _subset
from tests.losses import numpy_reference
from tests.losses.pairs import vector

L1 = 0.3132616875182228
BETA = 0.3


def losses(name, inputs, **params):
    spec = get_loss(name)
    return spec(**{key: inputs[key] for key in spec.inputs if key not in spec.optional_inputs}, **params).losses


def of_tokens(name, chosen, rejected, weights=None, **params):
    """Return the loss of one pair with these token log-ratios (lists); the rejected response is padded with a 0."""
    length = {"chosen": len(chosen), "rejected": len(rejected)}
    ratios = {"chosen": vector(*chosen)[None], "rejected": vector(*rejected, 0.0)[None]}
    inputs = {f"policy_{side}_token_logps": ratios[side] for side in ratios}
    inputs |= {f"ref_{side}_token_logps": torch.zeros_like(ratios[side]) for side in ratios}
    inputs |= {f"{side}_lengths": torch.tensor([length[side]]) for side in ratios}
    inputs |= {"rows": torch.tensor([4]), "pair_in_row": torch.tensor([0])}
    if weights:
        inputs |= {f"{side}_token_weights": vector(*values)[None] for side, values in weights.items()}
    spec = get_loss(name)
    return spec(**{key: inputs[key] for key in spec.inputs if key not in spec.optional_inputs}, **params)


def test_d2po_by_hand():
    """γ = ½: Σ γ^t ρ_t is ½·2 + ¼·4 = 2 of the chosen and ½·(−2) = −1 of the rejected; β = 1/3: ℓ(1)."""
    output = of_tokens("d2po", [2.0, 4.0], [-2.0], beta=1 / 3, gamma=0.5)
    assert output.losses.item() == pytest.approx(L1)
    assert output.rewards[0].tolist() == pytest.approx([2 / 3, -1 / 3])


def test_tis_dpo_by_hand():
    """Weights (1, ½) and 3: 1·1 + ½·2 = 2 and 3·(−⅓) = −1; padding does not count."""
    weights = {"chosen": [1.0, 0.5], "rejected": [3.0, 7.0]}
    output = of_tokens("tis_dpo", [1.0, 2.0], [-1 / 3], weights, beta=1 / 3)
    assert output.losses.item() == pytest.approx(L1)
    assert output.rewards[0].tolist() == pytest.approx([2 / 3, -1 / 3])


def test_sampo_by_hand():
    """Three equal tokens against one: any one of the three counts: ρ = 2 against −1; β = 1/3: ℓ(1)."""
    output = of_tokens("sampo", [2.0, 2.0, 2.0], [-1.0], beta=1 / 3)
    assert output.losses.item() == pytest.approx(L1)
    assert output.rewards[0].tolist() == pytest.approx([2 / 3, -1 / 3])


def test_tdpo_by_hand():
    """r = (1, 0), D = (4, 2). TDPO1: h − (D_l − D_w) = 3, with β = 1/3 ℓ(1), rewards (5/3, 2/3).
    TDPO2, α = ½: 1 − ½(2 − 4) = 2, with β = ½ ℓ(1), rewards ½·(1 + 2, 0 + 1)."""
    inputs = vector(1.0), vector(0.0), vector(0.0), vector(0.0), vector(4.0), vector(2.0)
    first, second = get_loss("tdpo1").function(*inputs, beta=1 / 3), get_loss("tdpo2").function(*inputs, beta=0.5)
    assert (first.losses.item(), second.losses.item()) == (pytest.approx(L1), pytest.approx(L1))
    assert first.rewards[0].tolist() == pytest.approx([5 / 3, 2 / 3])
    assert second.rewards[0].tolist() == pytest.approx([1.5, 0.5])


def test_tdpo2_holds_the_chosen_kl_fixed():
    """At z = 0, dℓ/dz = −½: TDPO1's gradients in (D_w, D_l) are β(−½, ½); TDPO2's are (none, αβ/2)."""
    zero = vector(0.0)
    for name, expected in (("tdpo1", (-0.15, 0.15)), ("tdpo2", (None, 0.075))):
        kl = [vector(2.0).requires_grad_() for _ in range(2)]
        get_loss(name).function(zero, zero, zero, zero, *kl, beta=BETA).losses.sum().backward()
        assert [None if x.grad is None else pytest.approx(x.grad.item()) for x in kl] == [*expected]


def test_mallows_by_hand():
    """Entropies whose mean is e⁻²: −log H = 2, c = ½, β = 1/3, h = 3: ℓ(1). Without a reference s̄ = (−1, −2), c = 1,
    β = ½: ℓ(2 · ½ · 1) again."""
    entropies = vector(math.exp(-2) / 2), vector(1.5 * math.exp(-2))
    output = get_loss("mallows_dpo").function(
        vector(2.0), vector(-1.0), vector(0.0), vector(0.0), *entropies, beta=1 / 3, dispersion_scale=0.5
    )
    assert output.losses.item() == pytest.approx(L1)
    assert output.rewards[0].tolist() == pytest.approx([2 / 3, -1 / 3])
    assert output.components["dispersion"].item() == pytest.approx(1.0)
    free = get_loss("mallows_dpo_per_token").function(
        vector(-2.0), vector(-8.0), vector(2.0), vector(4.0), *entropies, beta=0.5, dispersion_scale=1.0
    )
    assert free.losses.item() == pytest.approx(L1)


def test_a_reference_without_entropy_gives_a_finite_mallows_loss():
    """H = 0 counts as the smallest positive number: −log of it is 708 in float64."""
    zero = vector(0.0)
    output = get_loss("mallows_dpo").function(vector(1.0), zero, zero, zero, zero, zero, beta=0.01)
    assert output.losses.isfinite().all() and output.components["dispersion"].item() == pytest.approx(708.4, abs=0.1)


@pytest.mark.parametrize(
    ("name", "neutral"),
    [("d2po", {"gamma": 1.0}), ("tdpo2", {"alpha": 0.0}), ("tis_dpo", {}), ("sampo", {}), ("mallows_dpo", {})],
)
def test_neutral_setting_is_dpo(name, neutral):
    """γ = 1, α = 0, weights of 1, equal lengths, H = 1/e: DPO's losses, up to the order in which tokens are added."""
    inputs = made_up_inputs()
    for side in ("chosen", "rejected"):
        inputs[f"{side}_token_weights"] = inputs[f"{side}_token_mask"].double()
        inputs[f"ref_{side}_normalized_entropy"] = torch.full((5,), math.exp(-1), dtype=torch.float64)
    if name == "sampo":
        inputs["rejected_lengths"] = inputs["chosen_lengths"] = torch.full((5,), 32)
    torch.testing.assert_close(
        losses(name, inputs, beta=BETA, **neutral), losses("dpo", inputs, beta=BETA), rtol=1e-12, atol=0
    )


def test_tdpo2_at_alpha_one_is_tdpo1_in_value():
    inputs = made_up_inputs()
    torch.testing.assert_close(losses("tdpo2", inputs, alpha=1.0), losses("tdpo1", inputs), rtol=1e-14, atol=0)


def test_a_mallows_dispersion_scales_beta():
    """The pairs differ only in H: the loss of each pair is DPO's with β multiplied by −log(H)."""
    inputs = made_up_inputs()
    entropy = (inputs["ref_chosen_normalized_entropy"] + inputs["ref_rejected_normalized_entropy"]) / 2
    for pair in range(5):
        expected = losses("dpo", inputs, beta=-BETA * math.log(entropy[pair]))[pair]
        torch.testing.assert_close(losses("mallows_dpo", inputs, beta=BETA)[pair], expected, rtol=1e-13, atol=0)


def test_a_subset_has_as_many_tokens_as_asked_and_none_behind_the_end():
    lengths, counts = torch.tensor([7, 7, 3, 0]), torch.tensor([3, 7, 1, 0])
    subset = _subset(lengths, counts, torch.arange(4), width=9)
    assert subset.sum(1).tolist() == [3, 7, 1, 0]
    assert not (subset & (torch.arange(9) >= lengths[:, None])).any()


def test_every_token_is_as_likely_as_the_next():
    """Three of twelve tokens over 20,000 keys: each token occurs 5,000 times, within five standard deviations of
    √(20000·¼·¾) = 61. Two tokens occur together with probability (3·2)/(12·11): 909 times, standard deviation 29.
    """
    keys = torch.arange(20_000) * 977
    subset = _subset(torch.full((20_000,), 12), torch.full((20_000,), 3), keys, width=12)
    assert (subset.sum(0) - 5000).abs().max() < 305
    together = subset.double().T @ subset.double()
    assert (together[0, 1:] - 909).abs().max() < 145


def test_sampos_subsets_of_an_epoch():
    """The subsets equal NumPy's in epochs 0, 1 and 2, and differ between epochs and between seeds."""
    inputs = made_up_inputs()
    spec = get_loss("sampo")
    arguments = {numpy_reference.SHORT[key]: inputs[key].numpy() for key in spec.inputs}
    seen = []
    for given in ({}, {"epoch": 1}, {"epoch": 2}, {"seed": 1}, {"seed": 1, "epoch": 1}, {"seed": 2}):
        seen.append(spec(**{key: inputs[key] for key in spec.inputs}, **given).losses)
        expected, _ = numpy_reference.sampo(**arguments, **given)
        torch.testing.assert_close(seen[-1], torch.tensor(expected), rtol=1e-12, atol=0)
    assert all((a != b).any() for a, b in itertools.combinations(seen, 2))


def test_sampos_subset_depends_on_the_pair_and_the_seed_alone():
    """The subset depends on the row, on the pair in the row, and on the seed, but
    not on the other pairs of the batch.
    """
    inputs = made_up_inputs()
    inputs["chosen_lengths"], inputs["rejected_lengths"] = torch.full((5,), 32), torch.full((5,), 4)
    inputs["policy_chosen_token_logps"] = torch.linspace(-3, 0, 160, dtype=torch.float64).view(5, 32)
    whole = losses("sampo", inputs)
    alone = losses("sampo", {key: value[3:4] for key, value in inputs.items()})
    torch.testing.assert_close(alone, whole[3:4], rtol=0, atol=0)
    for other in ({**inputs, "rows": inputs["rows"] + 1}, {**inputs, "pair_in_row": inputs["pair_in_row"] + 1}):
        assert (losses("sampo", other) != whole).all()
    assert (losses("sampo", inputs, seed=1) != whole).all()
