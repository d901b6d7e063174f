"""The plain utilities: log-probs from logits or hidden states, and splitting of grouped rows, computed by hand."""

import math

import pytest
import torch

from tests.scoring.logps import (
    sequence_logps,
    sequence_logps_from_hidden,
    split_concatenated,
    split_interleaved,
    token_logps,
)

# The probabilities of two tokens over three words: (1/2, 1/4, 1/4) and (1/8, 1/8, 3/4).
LOGITS = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]], dtype=torch.float64).log()


def test_token_logps_by_hand():
    """log ½ and log ¾; adding a constant to the logits changes nothing."""
    for shift in (0.0, 100.0):
        logps = token_logps(LOGITS + shift, torch.tensor([0, 2]))
        assert logps.tolist() == pytest.approx([math.log(0.5), math.log(0.75)], rel=1e-12)


def test_temperature_by_hand():
    """At T = ½ probabilities are squared and normalized: (4, 1, 1)/6 and (1, 1, 36)/38."""
    logps = token_logps(LOGITS, torch.tensor([0, 2]), temperature=0.5)
    assert logps.tolist() == pytest.approx([math.log(4 / 6), math.log(36 / 38)], rel=1e-12)


def test_bf16_logits_are_summed_in_fp32():
    """log-softmax of 4,096 equal bf16 logits is −log 4096 to fp32 rounding; in bf16 it would be −8.3125."""
    logps = token_logps(torch.zeros(1, 4096, dtype=torch.bfloat16), torch.tensor([7]))
    assert logps.dtype == torch.float32
    assert logps.item() == pytest.approx(-math.log(4096), rel=1e-6)


def test_sequence_logps_shift_sum_and_average():
    """Position t predicts token t + 1. Tokens (1, 0, 2), with the last two scored: log ½ +
    log ¾, and the mean is half of it. With only the last one scored, it is log ¾ in both
    cases. Padding has a mask of 0, and the logits at the last position have no effect.
    """
    logits = torch.cat([LOGITS, torch.full((1, 3), 50.0, dtype=torch.float64)]).expand(3, 3, 3)
    ids = torch.tensor([[1, 0, 2], [1, 0, 2], [1, 0, 0]])
    mask = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 1, 0]])
    half, three_quarters = math.log(0.5), math.log(0.75)
    summed, averaged = sequence_logps(logits, ids, mask), sequence_logps(logits, ids, mask, average=True)
    assert summed.tolist() == pytest.approx([half + three_quarters, three_quarters, half])
    assert averaged.tolist() == pytest.approx([(half + three_quarters) / 2, three_quarters, half])


def test_a_sequence_without_scored_tokens_is_zero():
    """An empty sum is 0, and its average 0/1: no NaN."""
    nothing = torch.zeros(1, 3, dtype=torch.long)
    for average in (False, True):
        assert sequence_logps(LOGITS.new_zeros(1, 3, 3), nothing, nothing, average=average).tolist() == [0.0]


def test_masked_positions_take_no_gradient_and_no_nan():
    """−inf logits at an unscored position change neither the sum nor the gradient of the scored positions."""
    logits = torch.zeros(1, 3, 3, dtype=torch.float64)
    logits[0, 0] = float("-inf")
    logits.requires_grad_()
    value = sequence_logps(logits, torch.tensor([[1, 0, 2]]), torch.tensor([[0, 0, 1]]))
    assert value.item() == pytest.approx(-math.log(3))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient[0, 1:].isfinite().all()


def test_from_hidden_states_the_same():
    """hidden · Wᵀ with W = 1 is the logits themselves."""
    hidden = torch.cat([LOGITS, LOGITS[:1]])[None]
    ids, mask = torch.tensor([[1, 0, 2]]), torch.tensor([[0, 1, 1]])
    eye = torch.eye(3, dtype=torch.float64)
    for settings in ({}, {"average": True}, {"temperature": 0.5}):
        assert torch.equal(
            sequence_logps_from_hidden(hidden, eye, ids, mask, **settings),
            sequence_logps(hidden, ids, mask, **settings),
        )


def test_splitting_grouped_rows():
    """Interleaved: even rows are chosen. Concatenated: the first half is."""
    rows = torch.arange(8).view(4, 2)
    assert [part.tolist() for part in split_interleaved(rows)] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert [part.tolist() for part in split_concatenated(rows)] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@pytest.mark.parametrize("split", [split_interleaved, split_concatenated])
def test_an_odd_number_of_rows_is_refused(split):
    with pytest.raises(ValueError, match="3 rows"):
        split(torch.zeros(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(1, 2, dtype=torch.long)}, "do not agree"),
        ({"logits": torch.zeros(1, 2, 3)}, "do not agree"),
        ({"mask": torch.tensor([[1, 1, 1]])}, "first token"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    """Shapes, a scored first token, and meaningless temperatures raise errors."""
    arguments = {
        "logits": torch.zeros(1, 3, 3),
        "input_ids": torch.zeros(1, 3, dtype=torch.long),
        "mask": torch.tensor([[0, 1, 1]]),
    }
    with pytest.raises(ValueError, match=message):
        sequence_logps(**{**arguments, **change})
