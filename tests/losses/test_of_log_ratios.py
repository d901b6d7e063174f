"""Losses that are defined by a formula in the two log-ratios take the four sums, and check them."""

from __future__ import annotations  # turns annotations into strings, as any module may do

import inspect
import re

import pytest
import torch
from torch import Tensor

from hf_prefopt.losses import dpo_loss, get_loss, kto_pair_loss, list_losses
from hf_prefopt.losses.base import of_log_ratios

SUMS = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
OF_LOG_RATIOS = [name for name in list_losses() if hasattr(get_loss(name).function, "__wrapped__")]


@of_log_ratios()
def shifted_loss(chosen: Tensor, rejected: Tensor, shift: Tensor, beta: float = 0.5) -> Tensor:
    """r_l − r_w + shift."""
    return rejected - chosen + shift


def sums(*values):
    return [torch.tensor([value, value]) for value in values]


def test_takes_the_four_sums_by_position_and_name():
    """r_w = −1 + 3 = 2, r_l = −2 + 5 = 3: the loss is 3 − 2 + 10 and the rewards are half of 2 and 3."""
    assert list(inspect.signature(shifted_loss).parameters) == [*SUMS, "shift", "beta"]
    given = sums(-1.0, -2.0, -3.0, -5.0, 10.0)
    for output in (shifted_loss(*given), shifted_loss(**dict(zip((*SUMS, "shift"), given, strict=True)))):
        assert output.losses.tolist() == [11.0, 11.0]
        assert output.rewards.tolist() == [[1.0, 1.5], [1.0, 1.5]]


def test_tensors_with_annotations_as_strings_are_checked():
    with pytest.raises(ValueError, match=re.escape("shift (1,)")):
        shifted_loss(*sums(-1.0, -2.0, -3.0, -5.0), torch.zeros(1))


def test_a_wrong_call_names_the_loss():
    with pytest.raises(TypeError, match=r"dpo_loss\(\) missing .*'policy_rejected_logps'"):
        dpo_loss(torch.zeros(2))
    with pytest.raises(TypeError, match=r"dpo_loss\(\) got an unexpected keyword argument 'gamma'"):
        dpo_loss(torch.zeros(2), torch.zeros(2), gamma=1.0)


@pytest.mark.parametrize("name", OF_LOG_RATIOS)
def test_only_losses_that_can_be_reference_free_go_without_a_reference(name):
    spec = get_loss(name)
    needed = [key for key in spec.inputs if key not in spec.optional_inputs]
    given = {key: torch.ones(3) for key in needed} | {"ref_chosen_logps": None, "ref_rejected_logps": None}
    if spec.can_be_reference_free:
        assert len(spec.function(**given).losses) == 3
    else:
        with pytest.raises(ValueError, match=f"{spec.function.__name__} needs a reference"):
            spec.function(**given)


def test_kto_pair_needs_a_reference():
    """Without a reference, its baselines would be means of log-probs instead of log-ratios."""
    with pytest.raises(ValueError, match="kto_pair_loss needs a reference"):
        kto_pair_loss(torch.zeros(2), torch.zeros(2), None, None)
