"""Tests that every registered loss must pass. They run over the registry, so a new loss cannot be left out."""

import inspect
import itertools

import numpy as np
import pytest
import torch

from hf_prefopt.kinds import LISTS
from hf_prefopt.losses import get_loss, list_losses
from hf_prefopt.objective.build import build_objective
from hf_prefopt.testing import call, check_gradients, check_preferred_direction, loss_checks, made_up_inputs
from hf_prefopt.testing.checks import gradients, with_gradients
from tests.losses import numpy_reference

LOSSES = list_losses()
# Hyperparameters to test in addition to the defaults: for each name, a value that differs from every loss's default.
OTHER_VALUES = {
    "beta": 0.37,
    "label_smoothing": 0.2,
    "length_normalize": False,
    "gamma": 0.9,
    "gamma_beta_ratio": 0.3,
    "cpo_alpha": 0.4,
    "tpo_alpha": 0.4,
    "lambda_coef": 0.45,
    "lambda_end": 0.25,
    "delta": 2.5,
    "alpha": -0.6,
    "discopop_tau": 0.8,
    "function": "savage",
    "detach_weight": True,
    "calibration_weight": 1.0,
    "reward_bound": 0.1,
    "beta_prime": 0.3,
    "desirable_weight": 1.7,
    "undesirable_weight": 0.6,
    "log_form": True,
    "sft_coef": 0.4,
    "tau": 0.3,
    "normalize_scores": True,
    "seed": 3,
    "dispersion_scale": 0.6,
    "a": 0.1,
    "rho": 0.5,
    "eta": 0.6,
    "margin": "ratio",
}
# Values for losses in which the value above is out of range, or equal to the default.
OTHER_VALUES_OF = {
    "r_dpo": {"alpha": 0.6},
    "slic_hf": {"length_normalize": True},
    "infonca": {"alpha": 0.3},
    "nca": {"alpha": 0.3},
    "tdpo2": {"alpha": 0.2},
    "alpha_dpo": {"alpha": 0.6},
    "odpo": {"alpha": 0.6},
    "qrpo": {"length_normalize": True},
}
# Losses whose gradient in s_w may be positive; test_turning_points.py derives and tests the turning points.
RISING = {
    "ipo",  # a square: past its target
    "sppo_hard",  # squares: past their targets
    "cal_dpo",  # squares: past their targets
    "exo_pair",  # a KL to soft labels: past σ(βh) = 1 − ε
    "nca_pair",  # the chosen response is a noise sample too: past σ(βr_w) = 2/3
    "apo_down",  # lowers the chosen response by intent: where |r_w| < |h|
    "discopop",  # the mixture switches from ℓ to the larger e^−z around z = 0
    "focal_po",  # undetached: below p = e^(−1/γ)
    "nca",  # every response is a noise sample too
    "exo_rw",  # a KL to soft labels
    "rpo_bwd",  # a KL to soft labels
    "rpo_fwd",  # a KL to soft labels
    "rpo_sq",  # a square: past its target
    "sppo",  # squares: past their targets
}
# Losses that equal another loss at their defaults: they are compared at a different value.
TOLD_APART_BY = {
    "gpo": {"function": "exponential"},
    "infonca": {"alpha": 0.3},  # for α → 0, all weight is on the best response: softmax DPO
}


def other_values(name):
    """For each hyperparameter of the loss, settings that change only this one from its default."""
    values = OTHER_VALUES | OTHER_VALUES_OF.get(name, {})
    return [{key: values[key]} for key in get_loss(name).defaults]


def expected(name, inputs, **params):
    given = [key for key in get_loss(name).inputs if key in inputs and key not in get_loss(name).optional_inputs]
    arguments = {numpy_reference.SHORT[key]: inputs[key].numpy() for key in given}
    return getattr(numpy_reference, name)(**arguments, **params)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_paper_in_float64(name):
    """Losses and rewards equal the NumPy implementation to float64 rounding, at the defaults and at other values."""
    inputs = made_up_inputs()
    for params in [{}, *other_values(name)]:
        output, (losses, rewards) = call(name, inputs, **params), expected(name, inputs, **params)
        np.testing.assert_allclose(output.losses.numpy(), losses, rtol=1e-12, atol=1e-12)
        if rewards is None:
            assert output.rewards is None
        else:
            np.testing.assert_allclose(output.rewards.numpy(), rewards, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "column"), [(name, column) for name in LOSSES for column in get_loss(name).optional_inputs]
)
def test_equals_the_paper_with_a_further_column(name, column):
    """Optional columns, also in combination with ε; win rates replace ε."""
    inputs, plain = made_up_inputs(), call(name, made_up_inputs()).losses
    values = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    has_smoothing = "label_smoothing" in get_loss(name).defaults and column != "chosen_win_rates"
    for params in [{}, *([{"label_smoothing": 0.2}] if has_smoothing else [])]:
        output = call(name, inputs, **params, **{column: values})
        losses, rewards = expected(name, inputs, **params, **{numpy_reference.SHORT[column]: values.numpy()})
        np.testing.assert_allclose(output.losses.numpy(), losses, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(output.rewards.numpy(), rewards, rtol=1e-12, atol=1e-12)
        assert (output.losses != plain).any()
    for wrong in (values[:1], values[:, None]):
        with pytest.raises(ValueError, match=r"of the same (length|shape)"):
            call(name, inputs, **{column: wrong})


@pytest.mark.parametrize("name", LOSSES)
def test_every_hyperparameter_is_used(name):
    """Every hyperparameter changes the loss or its gradient: none is accepted and ignored."""

    def loss_and_gradient(**params):
        inputs = with_gradients(made_up_inputs())
        losses = call(name, inputs, **params).losses
        losses.sum().backward()
        return torch.cat([losses.detach(), gradients(name, inputs)])

    plain = loss_and_gradient()
    for params in other_values(name):
        assert not torch.equal(loss_and_gradient(**params), plain), params


def test_no_two_losses_are_the_same():
    """On one batch with one beta, all registered losses give different numbers: no name computes another loss."""
    inputs = made_up_inputs(pairs=9)
    values = {
        name: call(
            name, inputs, **({"beta": 0.7} if "beta" in get_loss(name).defaults else {}), **TOLD_APART_BY.get(name, {})
        ).loss.item()
        for name in LOSSES
    }
    for (a, x), (b, y) in itertools.combinations(values.items(), 2):
        assert abs(x - y) > 1e-6, (a, b)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        (name, check)
        for name in LOSSES
        for check in loss_checks(name)
        if name not in RISING or check is not check_preferred_direction
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_passes_the_standard_checks(name, check):
    """The checks of `hf_prefopt.testing` that apply to the loss."""
    check(name)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_value_away_from_the_defaults(name):
    for params in other_values(name):
        check_gradients(name, **params)


@pytest.mark.parametrize("name", LOSSES)
def test_refuses_shapes_that_do_not_fit(name):
    """A vector with a different length, or a matrix, raises an error and is not broadcast."""
    inputs = made_up_inputs()
    for key in [key for key in get_loss(name).inputs if key in inputs and key not in get_loss(name).optional_inputs]:
        for wrong in (inputs[key][:1], inputs[key][:, None]):
            if get_loss(name).kind is LISTS:
                wrong = {1: inputs[key][:, :1], 2: inputs[key][:, 0]}[1 if wrong.dim() == 2 else 2]
            with pytest.raises(ValueError, match=r"of the same (length|shape)"):
                call(name, {**inputs, key: wrong})
        if len(get_loss(name).inputs) == 1:
            break


@pytest.mark.parametrize("name", [name for name in LOSSES if "beta" in get_loss(name).defaults])
@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan"), float("inf")])
def test_refuses_a_beta_that_is_not_positive(name, beta):
    with pytest.raises(ValueError, match="beta="):
        call(name, made_up_inputs(), beta=beta)


@pytest.mark.parametrize("name", LOSSES)
def test_an_unknown_hyperparameter_is_refused_with_the_name(name):
    with pytest.raises(ValueError, match=f"{name} takes"):
        build_objective([name], loss_params={"no_such_parameter": 1.0})


@pytest.mark.parametrize("name", LOSSES)
def test_documents_itself(name):
    """The docstring starts with the formula, and has the source and a `Raises` section."""
    docstring = inspect.getdoc(get_loss(name).function)
    assert "Raises" in docstring
    assert get_loss(name).description
    assert name.startswith("sft") or get_loss(name).paper
    assert "\nUse it " in docstring
