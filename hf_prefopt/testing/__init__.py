"""Standard tests for losses, both for the losses of this package and for losses that you register.

import pytest
from hf_prefopt.testing import loss_checks

@pytest.mark.parametrize("check", loss_checks("my_loss"), ids=lambda check: check.__name__)
def test_my_loss(check):
    check("my_loss")
"""

from hf_prefopt.kinds.made_up import made_up_inputs
from hf_prefopt.testing.checks import (
    call,
    check_empty_responses,
    check_examples_apart,
    check_far_out,
    check_fp32,
    check_gradients,
    check_list_order,
    check_list_padding,
    check_list_ties,
    check_objective,
    check_order_of_examples,
    check_preferred_direction,
    check_token_width,
    loss_checks,
)

__all__ = [
    "call",
    "check_empty_responses",
    "check_examples_apart",
    "check_far_out",
    "check_fp32",
    "check_gradients",
    "check_list_order",
    "check_list_padding",
    "check_list_ties",
    "check_objective",
    "check_order_of_examples",
    "check_preferred_direction",
    "check_token_width",
    "loss_checks",
    "made_up_inputs",
]
