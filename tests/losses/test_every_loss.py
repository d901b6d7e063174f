"""What every registered loss must fulfil. The tests run over the registry, so a new loss cannot be left out."""

import inspect
import itertools

import numpy as np
import pytest
import torch

from hf_prefopt.losses import get_loss, list_losses
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
}
# Squares have a turning point by construction, and are tested for it by name.
MAY_FALL_AGAIN = {"ipo"}


def call(name, inputs, **params):
    spec = get_loss(name)
    return spec(**{key: inputs[key] for key in spec.inputs}, **params)


def expected(name, inputs, **params):
    arguments = {numpy_reference.SHORT[key]: inputs[key].double().numpy() for key in get_loss(name).inputs}
    return getattr(numpy_reference, name)(**arguments, **params)


@pytest.mark.parametrize("name", LOSSES)
def test_equals_the_paper_in_float64(name):
    """Value and rewards equal the NumPy implementation to float64 rounding, at the defaults and away from each."""
    inputs = made_up_inputs()
    for params in [{}, *({key: OTHER_VALUES[key]} for key in get_loss(name).defaults)]:
        output, (losses, rewards) = call(name, inputs, **params), expected(name, inputs, **params)
        np.testing.assert_allclose(output.losses.numpy(), losses, rtol=1e-12, atol=1e-12)
        if rewards is None:
            assert output.rewards is None
        else:
            np.testing.assert_allclose(output.rewards.numpy(), rewards, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_every_hyperparameter_is_used(name):
    """A hyperparameter that is given changes the loss: none is accepted and ignored."""
    inputs = made_up_inputs()
    plain = call(name, inputs).loss
    for key in get_loss(name).defaults:
        assert call(name, inputs, **{key: OTHER_VALUES[key]}).loss != plain, key


def test_no_two_losses_are_the_same():
    """On one batch every registered loss gives its own number, at one shared beta: no name computes another's loss."""
    inputs = made_up_inputs()
    values = {
        name: call(name, inputs, **({"beta": 0.7} if "beta" in get_loss(name).defaults else {})).loss.item()
        for name in LOSSES
    }
    for (a, x), (b, y) in itertools.combinations(values.items(), 2):
        assert abs(x - y) > 1e-6, (a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_value(name):
    """Float64 gradcheck of the losses with respect to the policy's log-probs.

    Detached parts (KTO's baseline) are held fixed by making the check at a point where their clamp at 0 is active.
    """
    inputs = made_up_inputs()
    if get_loss(name).needs_global_batch:
        for side in ("chosen", "rejected"):
            inputs[f"policy_{side}_logps"] = inputs[f"ref_{side}_logps"] - 2 - torch.rand(5, dtype=torch.float64)
    policy = [key for key in get_loss(name).inputs if key.startswith("policy") and key.endswith("logps")]

    def losses(*values):
        return call(name, {**inputs, **dict(zip(policy, values, strict=True))}).losses

    assert torch.autograd.gradcheck(losses, [inputs[key].clone().requires_grad_() for key in policy])


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in MAY_FALL_AGAIN])
def test_raising_the_chosen_response_never_raises_the_loss(name):
    """dL/ds_w ≤ 0, and dL/ds_l ≥ 0, for every pair."""
    inputs = {
        key: value.clone().requires_grad_("policy" in key and "logps" in key) for key, value in made_up_inputs().items()
    }
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
    assert far["policy_chosen_logps"].grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_documents_itself(name):
    """Formula first, the source, and what it raises."""
    docstring = inspect.getdoc(get_loss(name).function)
    assert "Raises" in docstring
    assert get_loss(name).description
    assert name == "sft" or get_loss(name).paper
