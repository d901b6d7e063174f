"""The checks for users' losses detect the faults that they are made for."""

import pytest
import torch

from hf_prefopt import register_loss
from hf_prefopt.kinds.made_up import made_up_inputs
from hf_prefopt.losses import registry
from hf_prefopt.testing import (
    check_examples_apart,
    check_far_out,
    check_gradients,
    check_preferred_direction,
    loss_checks,
)


@pytest.fixture
def register(monkeypatch):
    """Registers a loss for the duration of a test."""
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    return lambda function: register_loss("users_own")(function)


def test_the_checks_see_ties_single_tokens_and_single_responses():
    """The examples of the checks have ties, single tokens and single responses, so
    they detect losses that fail on these.
    """
    inputs = made_up_inputs()
    assert inputs["chosen_lengths"][0] == 1
    assert inputs["policy_chosen_logps"][3] == inputs["policy_rejected_logps"][3]
    assert inputs["ref_chosen_logps"][3] == inputs["ref_rejected_logps"][3]
    assert inputs["list_mask"].sum(1).tolist() == [2, 3, 4, 2, 1]
    for name in ("list_ranks", "list_scores"):
        assert inputs[name][2, 0] == inputs[name][2, 1]


def test_a_sound_loss_of_three_lines_passes(register):
    @register
    def hinge(policy_chosen_logps, policy_rejected_logps, beta=0.3):
        return torch.relu(1 - beta * (policy_chosen_logps - policy_rejected_logps))

    checks = loss_checks("users_own")
    assert len(checks) >= 6
    for check in checks:
        check("users_own")


def test_the_wrong_sign_is_noticed(register):
    @register
    def backwards(policy_chosen_logps, policy_rejected_logps):
        return torch.relu(1 + policy_chosen_logps - policy_rejected_logps)

    with pytest.raises(AssertionError):
        check_preferred_direction("users_own")


def test_probabilities_of_whole_sequences_are_noticed(register):
    @register
    def underflows(policy_chosen_logps, policy_rejected_logps):
        return torch.log(policy_chosen_logps.exp() + policy_rejected_logps.exp()) - policy_chosen_logps

    with pytest.raises(AssertionError):
        check_far_out("users_own")


def test_a_statistic_of_the_batch_that_is_not_declared_is_noticed(register):
    @register
    def centerd(policy_chosen_logps, policy_rejected_logps):
        margin = policy_chosen_logps - policy_rejected_logps
        return torch.nn.functional.softplus(margin.mean() - margin)

    with pytest.raises(AssertionError):
        check_examples_apart("users_own")


def test_a_gradient_that_is_not_the_values_is_noticed(register):
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    @register
    def doubled(policy_chosen_logps, policy_rejected_logps):
        return -Twice.apply(policy_chosen_logps) + policy_rejected_logps

    with pytest.raises(RuntimeError, match="Jacobian"):
        check_gradients("users_own")
