"""The atlas shows the registered function of every loss of pairs."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import softplus

from hf_prefopt.kinds import PAIRS
from hf_prefopt.losses import get_loss, list_losses
from hf_prefopt.reporting.loss_atlas import curve_of

DRAWN = Path(__file__).parents[2] / "docs" / "images" / "loss_atlas.svg"
LOSSES = [name for name in list_losses() if get_loss(name).kind is PAIRS]


@pytest.mark.parametrize(
    ("name", "losses", "gradients"),
    [
        ("dpo", lambda h: softplus(-0.1 * h), lambda h: -0.1 * torch.sigmoid(-0.1 * h)),
        ("hinge", lambda h: (1 - 0.05 * h).relu(), lambda h: torch.full_like(h, -0.05)),
        ("sft", lambda h: (30 - h / 2) / 20, lambda h: -torch.ones_like(h) / 40),
    ],
)
def test_a_curve_is_the_formula(name, losses, gradients):
    curve = curve_of(get_loss(name), points=9)
    inside = curve.h < 20  # the position of the hinge's kink
    assert torch.allclose(curve.losses, losses(curve.h), rtol=1e-12)
    assert torch.allclose(curve.gradients[inside], gradients(curve.h)[inside], rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_curve_is_finite_and_trains(name):
    curve = curve_of(get_loss(name), points=3)
    assert curve.losses.isfinite().all() and curve.gradients.isfinite().all()
    assert curve.gradients.abs().max() > 0


def test_the_picture_has_every_loss():
    drawn = DRAWN.read_text(encoding="utf-8")
    assert [name for name in LOSSES if f">{name}<" not in drawn] == []
