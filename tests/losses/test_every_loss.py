"""What every registered loss must fulfil. The tests run over the registry, so a new loss cannot be left out."""

import inspect
import itertools

import numpy as np
import pytest
import torch

from hf_prefopt.losses import get_loss, list_losses
from hf_prefopt.losses.objective import build_objective
from tests.losses import numpy_reference
from tests.losses.batches import made_up_inputs

LOSSES = list_losses()
# The hyperparameters tried besides the defaults: for each name, a value away from every loss's default.
OTHER_VALUES = {
    "beta": 0.37,
    "label_smoothing": 0.2,
    "length_normalize": False,
    "gamma": 0.9,
    "gamma_beta_ratio": 0.3,
    "cpo_alpha": 0.4,
    "lambda_coef": 0.45,
    "delta": 2.5,
    "alpha": -0.6,
    "discopop_tau": 0.8,
    "function": "savage",
    "detach_weight": True,
    "calibration_weight": 1.0,
    "reward_bound": 0.1,
    "beta_prime": 0.3,
}
# Where that value is out of a loss's range, or its default.
OTHER_VALUES_OF = {"r_dpo": {"alpha": 0.6}, "slic_hf": {"length_normalize": True}}
# Losses whose gradient in s_w may be positive, each by its formula, its turning point tested in test_turning_points.py.
RISING = {
    "ipo",  # a square: past its target
    "sppo_hard",  # squares: past their targets
    "cal_dpo",  # squares: past their targets
    "exo_pair",  # a KL to soft labels: past σ(βh) = 1 − ε
    "nca_pair",  # the chosen response is a noise sample too: past σ(βr_w) = 2/3
    "apo_down",  # lowers the chosen response by intent: where |r_w| < |h|
    "discopop",  # the mixture switches from ℓ to the larger e^−z around z = 0
    "focal_po",  # undetached: below p = e^(−1/γ)
}
# Losses defined as another where a hyperparameter is at its default: told apart at a value away from it.
TOLD_APART_BY = {"gpo": {"function": "exponential"}}


def other_values(name):
    """For each hyperparameter of the loss: that one alone, away from its default."""
    values = OTHER_VALUES | OTHER_VALUES_OF.get(name, {})
    return [{key: values[key]} for key in get_loss(name).defaults]


def call(name, inputs, **params):
    spec = get_loss(name)
    return spec(**{key: inputs[key] for key in spec.inputs}, **params)


def with_gradients(inputs):
    """The same inputs, the policy's log-probs as leaves that record gradients."""
    return {key: value.requires_grad_("policy" in key and "logps" in key) for key, value in inputs.items()}


def expected(name, inputs, **params):
    arguments = {numpy_reference.SHORT[key]: inputs[key].double().numpy() for key in get_loss(name).inputs}
    return getattr(numpy_reference, name)(**arguments, **params)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_paper_in_float64(name):
    """Value and rewards equal the NumPy implementation to float64 rounding, at the defaults and away from each."""
    inputs = made_up_inputs()
    for params in [{}, *other_values(name)]:
        output, (losses, rewards) = call(name, inputs, **params), expected(name, inputs, **params)
        np.testing.assert_allclose(output.losses.numpy(), losses, rtol=1e-12, atol=1e-12)
        if rewards is None:
            assert output.rewards is None
        else:
            np.testing.assert_allclose(output.rewards.numpy(), rewards, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_every_hyperparameter_is_used(name):
    """A hyperparameter that is given changes the loss or its gradient: none is accepted and ignored."""

    def loss_and_gradient(**params):
        inputs = with_gradients(made_up_inputs())
        losses = call(name, inputs, **params).losses
        losses.sum().backward()
        return torch.cat([losses.detach(), inputs["policy_chosen_logps"].grad])

    plain = loss_and_gradient()
    for params in other_values(name):
        assert not torch.equal(loss_and_gradient(**params), plain), params


def test_no_two_losses_are_the_same():
    """On one batch every registered loss gives its own number, at one shared beta: no name computes another's loss."""
    inputs = made_up_inputs()
    values = {
        name: call(
            name, inputs, **({"beta": 0.7} if "beta" in get_loss(name).defaults else {}), **TOLD_APART_BY.get(name, {})
        ).loss.item()
        for name in LOSSES
    }
    for (a, x), (b, y) in itertools.combinations(values.items(), 2):
        assert abs(x - y) > 1e-6, (a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_value(name):
    """Float64 gradcheck of the losses with respect to the policy's log-probs.

    Detached parts (KTO's baseline) are held fixed by making the check at a point where their clamp at 0 is active;
    FocalPO's detached weight is no gradient of the value, and has a test of its own.
    """
    inputs = made_up_inputs()
    if get_loss(name).needs_global_batch:
        for side in ("chosen", "rejected"):
            inputs[f"policy_{side}_logps"] = inputs[f"ref_{side}_logps"] - 2 - torch.rand(5, dtype=torch.float64)
    policy = [key for key in get_loss(name).inputs if key.startswith("policy") and key.endswith("logps")]

    def losses(*values):
        return call(name, {**inputs, **dict(zip(policy, values, strict=True))}, **params).losses

    for params in [{}, *(params for params in other_values(name) if "detach_weight" not in params)]:
        assert torch.autograd.gradcheck(losses, [inputs[key].clone().requires_grad_() for key in policy]), params


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in RISING])
def test_raising_the_chosen_response_never_raises_the_loss(name):
    """dL/ds_w ≤ 0, and dL/ds_l ≥ 0, for every pair."""
    inputs = with_gradients(made_up_inputs(pairs=50))
    call(name, inputs).losses.sum().backward()
    assert (inputs["policy_chosen_logps"].grad <= 0).all()
    rejected = inputs["policy_rejected_logps"].grad
    assert rejected is None or (rejected >= 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_pairs_does_not_matter(name):
    """Permuting the pairs permutes the losses."""
    inputs, order = made_up_inputs(), torch.tensor([3, 0, 4, 1, 2])
    permuted = call(name, {key: value[order] for key, value in inputs.items()}).losses
    torch.testing.assert_close(permuted, call(name, inputs).losses[order], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", [name for name in LOSSES if not get_loss(name).needs_global_batch])
def test_a_pair_is_alone_in_its_loss(name):
    """The loss of a pair computed alone equals its loss in a batch."""
    inputs = made_up_inputs()
    alone = torch.cat([call(name, {k: v[i : i + 1] for k, v in inputs.items()}).losses for i in range(5)])
    torch.testing.assert_close(alone, call(name, inputs).losses, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_refuses_shapes_that_do_not_fit(name):
    """One vector of another length, or a matrix, is an error and not a broadcast."""
    inputs = made_up_inputs()
    for key in get_loss(name).inputs:
        for wrong in (inputs[key][:1], inputs[key][:, None]):
            with pytest.raises(ValueError, match="vectors"):
                call(name, {**inputs, key: wrong})
        if len(get_loss(name).inputs) == 1:
            break


@pytest.mark.parametrize("name", [name for name in LOSSES if "beta" in get_loss(name).defaults])
@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan"), float("inf")])
def test_refuses_a_beta_that_is_not_positive(name, beta):
    with pytest.raises(ValueError, match="beta="):
        call(name, made_up_inputs(), beta=beta)


@pytest.mark.parametrize("name", LOSSES)
def test_stays_finite_far_out(name):
    """Sums of −3,000 nats and ratios of ±1,000 give finite losses and gradients in fp32: no exp(log-prob) is formed."""
    inputs = made_up_inputs(torch.float32)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    far = {key: value - 3000 if "ref" in key else value for key, value in inputs.items()}
    far["policy_chosen_logps"] = (far["ref_chosen_logps"] + 1000 * sign).requires_grad_()
    far["policy_rejected_logps"] = (far["ref_rejected_logps"] - 1000 * sign).requires_grad_()
    output = call(name, far)
    output.losses.sum().backward()
    assert output.losses.isfinite().all()
    assert output.rewards is None or output.rewards.isfinite().all()
    for side in ("chosen", "rejected"):
        gradient = far[f"policy_{side}_logps"].grad
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_fp32_is_enough_for_long_responses(name):
    """2,000 tokens and −3,000 nats in fp32, where e^s underflows: losses within what rounding s to 1e-4 explains."""
    inputs = made_up_inputs()
    for side in ("chosen", "rejected"):
        inputs[f"{side}_lengths"] = inputs[f"{side}_lengths"] + 2000
        for model in ("policy", "ref"):
            inputs[f"{model}_{side}_logps"] = inputs[f"{model}_{side}_logps"] - 3000
    single = {key: value.float() for key, value in inputs.items()}
    torch.testing.assert_close(
        call(name, single).losses.double(), call(name, inputs).losses, rtol=2e-3, atol=2e-4, check_dtype=False
    )


@pytest.mark.parametrize("name", [name for name in LOSSES if "chosen_lengths" in get_loss(name).inputs])
def test_an_empty_response_is_no_division_by_zero(name):
    """An empty response (length 0, sum 0) gives finite losses and gradients."""
    inputs = made_up_inputs()
    empty = {
        key: torch.zeros_like(value) if "lengths" in key or "logps" in key else value for key, value in inputs.items()
    }
    empty = with_gradients(empty)
    losses = call(name, empty).losses
    losses.sum().backward()
    assert losses.isfinite().all() and empty["policy_chosen_logps"].grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_stands_as_an_objective(name):
    """What a configuration of that one loss computes is the loss, and a bad hyperparameter is refused with the name."""
    inputs = made_up_inputs()
    torch.testing.assert_close(build_objective([name])(inputs).losses, call(name, inputs).losses, rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"{name} takes"):
        build_objective([name], loss_params={"no_such_parameter": 1.0})


@pytest.mark.parametrize("name", LOSSES)
def test_documents_itself(name):
    """Formula first, the source, and what it raises."""
    docstring = inspect.getdoc(get_loss(name).function)
    assert "Raises" in docstring
    assert get_loss(name).description
    assert name == "sft" or get_loss(name).paper
