"""The points at which a more likely chosen response starts or stops increasing a loss, derived from the formulas."""

import math

import pytest
import torch

from tests.losses.pairs import by_log_ratios, vector
from tests.losses.test_every_loss import RISING

SUMMED = {"length_normalize": False}
# name, hyperparameters, r_l, r_w at the turning point, and the signs of dL/dr_w below and above it.
TURNS = [
    ("ipo", {"beta": 0.5, **SUMMED}, 0.0, 1.0, (-1, 1)),  # h = 1/(2β)
    ("sppo_hard", {"beta": 0.5}, 0.0, 1.0, (-1, 1)),  # r_w = 1/(2β)
    # ½·2(r_w − 1) = σ(−h); with r_l = r_w at the turn, h = 0 and σ = ½: r_w = 1.5.
    ("cal_dpo", {"beta": 0.5}, 1.5, 1.5, (-1, 1)),
    ("exo_pair", {"beta": 1.0, "label_smoothing": 0.1}, 0.0, math.log(9), (-1, 1)),  # βh = log((1−ε)/ε)
    ("nca_pair", {"beta": 1.0}, 0.0, math.log(2), (-1, 1)),  # σ(βr_w) = 2/3
    ("apo_down", {"beta": 1.0}, 1.0, 0.5, (1, -1)),  # |r_w| = |r_w − r_l|
    # The two turns that the paper reports for β = τ = 0.05.
    ("discopop", {}, 0.0, -2.3714, (-1, 1)),
    ("discopop", {}, 0.0, 1.4401, (1, -1)),
    ("focal_po", {"beta": 1.0, "gamma": 1.0}, 0.0, -math.log(math.e - 1), (1, -1)),  # p = e^(−1/γ)
    ("nca", {"beta": 1.0}, 0.0, math.log(2), (-1, 1)),  # p = (1, 0), K = 2: σ(βr_w) = K/(K + 1)
    ("exo_rw", {"beta": 1.0, "tau": 0.5}, 0.0, 2.0, (-1, 1)),  # softmax(βr) = softmax(R/τ): βh = 1/τ
    ("gpo", {"beta": 1.0, "function": "square"}, 0.0, 1.0, (-1, 1)),  # z = 1
    # ΔR = 1: βh = η.
    *((name, {"beta": 0.5, "eta": 2.0}, 0.0, 4.0, (-1, 1)) for name in ("rpo_bwd", "rpo_fwd", "rpo_sq")),
    ("sppo", {"beta": 0.5}, 0.0, 1.0, (-1, 1)),  # P = 1: r_w = 1/(2β)
]


def slope(name, r_w, r_l, **params):
    chosen = vector(r_w).requires_grad_()
    by_log_ratios(name, chosen, r_l, **params).losses.sum().backward()
    return chosen.grad.item()


@pytest.mark.parametrize(("name", "params", "r_l", "turn", "signs"), TURNS)
def test_turns_where_the_formula_says(name, params, r_l, turn, signs):
    sides = [slope(name, turn + step, r_l, **params) for step in (-1e-3, 1e-3)]
    assert [math.copysign(1, side) for side in sides] == list(signs)


def test_every_exempted_loss_has_its_turning_point_tested():
    assert {turn[0] for turn in TURNS} >= RISING


@pytest.mark.parametrize("r_w", [-30.0, -3.0, 0.0, 3.0])
def test_a_detached_focal_weight_only_weighs_dpos_gradient(r_w):
    """dL/dz = −p^γ(1 − p): never positive, where the undetached one is −p^γ(1 − p)(1 + γ log p)."""
    p = torch.sigmoid(vector(r_w)).item()
    for detach_weight, factor in ((True, 1.0), (False, 1 + 0.5 * math.log(p))):
        params = {"beta": 1.0, "gamma": 0.5, "detach_weight": detach_weight}
        assert slope("focal_po", r_w, 0.0, **params) == pytest.approx(-math.sqrt(p) * (1 - p) * factor)


def test_focal_po_at_its_default_turns_only_for_hopeless_pairs():
    """γ = 0.05: p = e⁻²⁰, βh = −20."""
    assert slope("focal_po", -19.9, 0.0, beta=1.0) < 0 < slope("focal_po", -20.1, 0.0, beta=1.0)
