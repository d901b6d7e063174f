"""The atlas shows the registered function of every loss of pairs."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.nn.functional import softplus

from hf_prefopt.kinds import PAIRS
from hf_prefopt.losses import get_loss, list_losses
from hf_prefopt.reporting.loss_atlas import curve_of

DOCS = Path(__file__).parents[2] / "docs"
DRAWN = DOCS / "images" / "loss_atlas.svg"
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
    inside = curve.h < 20  # the position of the hinge's kink; its gradient is 0 beyond it
    assert torch.allclose(curve.losses, losses(curve.h), rtol=1e-12)
    assert torch.allclose(curve.gradients[inside], gradients(curve.h)[inside], rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_a_curve_is_finite_and_trains(name):
    curve = curve_of(get_loss(name), points=3)
    assert curve.losses.isfinite().all() and curve.gradients.isfinite().all()
    assert curve.gradients.abs().max() > 0


def test_the_picture_has_every_loss():
    drawn = DRAWN.read_text(encoding="utf-8")
    assert ">−0.0050</text>" in drawn  # a label of aot's gradient, which is not rounded
    assert [name for name in LOSSES if f">{name}<" not in drawn] == []


@cache
def relative_gradients(name: str) -> tuple[float, float]:
    """dℓ/dh at the two ends of the picture, as a share of the largest |dℓ/dh|."""
    gradients = curve_of(get_loss(name), points=21).gradients
    left, right = gradients[[0, -1]] / gradients.abs().max()
    return left.item(), right.item()


@pytest.mark.parametrize(
    ("paragraph", "holds"),
    [
        ("Pairs that are more than right", lambda left, right: right > 0.01),
        ("Pairs that are far wrong", lambda left, right: abs(left) < 0.55),
    ],
)
def test_the_page_names_the_losses_of_a_shape(paragraph, holds):
    """All of them; beside them it names `dpo`, to compare with, and `ipo`, whose target is outside the picture."""
    (text,) = re.findall(rf"- \*\*{paragraph}\*\*(.*?)(?=\n- |\n\n)", (DOCS / "atlas.md").read_text("utf-8"), re.DOTALL)
    named = set(re.findall(r"`(\w+)`", text)) - {"dpo", "ipo"}
    assert named == {name for name in LOSSES if holds(*relative_gradients(name))}
