"""Several losses as one objective: weights, shared and separate hyperparameters, modifiers, and errors."""

import pytest
import torch

from hf_prefopt.kinds.made_up import made_up_inputs
from hf_prefopt.objective.build import build_objective
from hf_prefopt.testing import call


def losses(name, inputs, **params):
    return call(name, inputs, **params).losses


def test_weighted_sum_with_named_components():
    """0.8 dpo + 1.0 sft: each component is logged without its weight under its name; the rewards are dpo's."""
    inputs = made_up_inputs()
    output = build_objective(["dpo", "sft"], [0.8, 1.0])(inputs)
    dpo, sft = losses("dpo", inputs), losses("sft", inputs)
    torch.testing.assert_close(output.losses, 0.8 * dpo + sft, rtol=1e-14, atol=0)
    torch.testing.assert_close(output.components["dpo"], dpo, rtol=0, atol=0)
    torch.testing.assert_close(output.components["sft"], sft, rtol=0, atol=0)
    chosen = inputs["policy_chosen_logps"] - inputs["ref_chosen_logps"]
    torch.testing.assert_close(output.chosen_rewards, 0.1 * chosen, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["dpo", "simpo", "kto_pair", "orpo"])
def test_sft_weight_adds_the_nll_of_the_chosen(name):
    inputs = made_up_inputs()
    output = build_objective([name], sft_weight=0.3)(inputs)
    expected = losses(name, inputs) + 0.3 * losses("sft", inputs)
    torch.testing.assert_close(output.losses, expected, rtol=1e-14, atol=0)


def test_use_weighting_weighs_pairs_and_leaves_sft_alone():
    """hinge · min(1, e^(a_w + a_l)) + sft."""
    inputs = made_up_inputs()
    output = build_objective(["hinge", "sft"], use_weighting=True)(inputs)
    weight = (inputs["policy_chosen_alignment"] + inputs["policy_rejected_alignment"]).clamp(max=0).exp()
    torch.testing.assert_close(output.losses, weight * losses("hinge", inputs) + losses("sft", inputs))
    assert build_objective(["dpo"], use_weighting=True).token_stats == ("log_sum_sq_probs",)
    assert build_objective(["dpo"]).token_stats == ()


def test_shared_parameters_reach_the_losses_that_take_them():
    """dpo and hinge get beta, and sft does not have it; a loss's own parameter overrides the shared one."""
    inputs = made_up_inputs()
    objective = build_objective(
        ["dpo", "hinge", "sft"], loss_params={"hinge": {"beta": 0.9}}, shared_params={"beta": 0.2}
    )
    expected = losses("dpo", inputs, beta=0.2) + losses("hinge", inputs, beta=0.9) + losses("sft", inputs)
    torch.testing.assert_close(objective(inputs).losses, expected)


def test_reference_free_leaves_the_reference_out():
    """Hinge on s instead of r equals CPO's hinge form with sft_weight, and needs no reference."""
    inputs = made_up_inputs()
    objective = build_objective(["hinge"], reference_free=True, sft_weight=1.0, shared_params={"beta": 0.01})
    margin = inputs["policy_chosen_logps"] - inputs["policy_rejected_logps"]
    expected = torch.relu(1 - 0.01 * margin) + losses("sft", inputs)
    torch.testing.assert_close(objective(inputs).losses, expected)
    assert not objective.needs_reference_model
    assert build_objective(["hinge"]).needs_reference_model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_types": []}, "name at least one"),
        ({"loss_types": ["dpo"], "loss_weights": [1.0, 2.0]}, "give one weight for each of dpo"),
        ({"loss_types": ["dpo", "sigmoid"]}, "dpo is listed twice"),
        ({"loss_types": ["dpo", "sft"], "sft_weight": 1.0}, "sft is listed twice"),
        ({"loss_types": ["dpo"], "sft_weight": -1.0}, "sft_weight=-1.0 must be"),
        ({"loss_types": ["wpo"], "use_weighting": True}, "wpo already applies it"),
        ({"loss_types": ["sft"], "use_weighting": True}, "sft does not compare"),
        ({"loss_types": ["simpo"], "reference_free": True}, "simpo uses no reference"),
        ({"loss_types": ["kto_pair"], "reference_free": True}, "undefined without a reference"),
        ({"loss_types": ["dpo"], "loss_params": {"gamma": 1.0}}, "gamma=1.0 is not used by any loss: dpo takes"),
        ({"loss_types": ["dpo", "sft"], "loss_params": {"beta": 1.0}}, "group the hyperparameters by loss"),
        ({"loss_types": ["dpo", "sft"], "loss_params": {"ipo": {"beta": 1.0}}}, "ipo, which is not among the losses"),
        ({"loss_types": ["sft"], "shared_params": {"beta": 0.1}}, "sft takes no hyperparameters"),
        ({"loss_types": ["dpo"], "shared_params": {"label_smoothing": 0.5}}, "label_smoothing=0.5 must be"),
    ],
)
def test_refuses_what_makes_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        build_objective(**settings)
