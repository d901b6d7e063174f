"""Mistakes of public implementations; test_every_loss.py covers those that any loss can have."""

import pytest
import torch
import torch.nn.functional as F

from hf_prefopt.kinds.made_up import made_up_inputs
from hf_prefopt.losses import get_loss, list_losses
from hf_prefopt.testing import call
from tests.losses.pairs import by_log_ratios

BATCHWISE = [name for name in list_losses() if get_loss(name).needs_global_batch]


def test_r_dpo_trains_less_on_a_preference_for_length():
    """R-DPO with the sign reversed rewards length: the pair whose chosen response is longer has the lower loss."""
    longer, shorter = (by_log_ratios("r_dpo", 0.0, 0.0, lengths=lengths).losses for lengths in ((9, 3), (3, 9)))
    assert longer < by_log_ratios("dpo", 0.0, 0.0).losses < shorter


@pytest.mark.parametrize(
    ("name", "params"), [("r_dpo", {}), ("chi_po", {}), ("alphapo", {"gamma": 0.0}), ("simpo", {"gamma": 0.0})]
)
def test_logged_rewards_are_those_of_the_loss(name, params):
    """If the loss is ℓ of a reward margin, the logged rewards have this margin; they are not simply β·log-ratios."""
    output = call(name, made_up_inputs(), **params)
    expected = -F.logsigmoid(output.chosen_rewards - output.rejected_rewards)
    torch.testing.assert_close(output.losses, expected, rtol=1e-12, atol=0)


def test_label_smoothing_means_something_else_in_each_loss():
    """The same ε has three meanings: cDPO, robust and EXO give three numbers, and
    DPO without label smoothing a fourth.
    """
    values = [
        by_log_ratios(name, 2.0, 0.0, beta=0.5, label_smoothing=epsilon).losses.item()
        for name, epsilon in (("dpo", 0.0), ("dpo", 0.2), ("robust", 0.2), ("exo_pair", 0.2))
    ]
    assert len({round(value, 6) for value in values}) == 4


def _gradient(tensor):
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


@pytest.mark.parametrize("name", BATCHWISE)
@pytest.mark.parametrize("sizes", [(2, 3), (1, 1, 3), (1, 1, 1, 1, 1)])
def test_batchwise_losses_are_those_of_the_global_batch(name, sizes):
    """For every split of 5 pairs, each part gets the other parts as constants, as in the trainer. The losses then equal
    those of the whole batch, and the gradients add up to the gradient of the batch.
    """
    inputs = made_up_inputs()
    keys = [key for key in get_loss(name).inputs if key.startswith("policy")]

    def part(rows):
        live = {key: inputs[key][rows].clone().requires_grad_() for key in keys}
        everything = dict(inputs)
        for key in keys:
            everything[key] = torch.cat([inputs[key][: rows.start], live[key], inputs[key][rows.stop :]])
        losses = call(name, everything).losses
        losses.sum().backward()
        return losses[rows].detach(), torch.stack([_gradient(live[key]) for key in keys])

    whole_losses, whole_gradients = part(slice(0, 5))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [part(slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    torch.testing.assert_close(torch.cat([losses for losses, _ in parts]), whole_losses, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.cat([g for _, g in parts], dim=1), whole_gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", BATCHWISE)
def test_batchwise_losses_of_a_micro_batch_are_another_number(name):
    """A loss computed on one rank's micro-batch would differ, so the losses declare `needs_global_batch`."""
    inputs = made_up_inputs()
    for side in ("chosen", "rejected"):  # Log-ratios above 0, where KTO's baseline is not clamped.
        inputs[f"policy_{side}_logps"] = inputs[f"policy_{side}_logps"] + 10
    halves = [{key: value[rows] for key, value in inputs.items()} for rows in (slice(0, 2), slice(2, 5))]
    apart = torch.cat([call(name, half, beta=0.5).losses for half in halves])
    assert (apart - call(name, inputs, beta=0.5).losses).abs().max() > 5e-3


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_is_the_mean_over_sorted_values(name):
    """Each loss stays at its own pair, and the mean is that of the sorted differences."""
    inputs = made_up_inputs(pairs=9)
    w, l, rw, rl = (inputs[f"{m}_{s}_logps"] for m in ("policy", "ref") for s in ("chosen", "rejected"))
    first, second = (w - l, rw - rl) if name == "aot" else (w - rw, l - rl)
    expected = -F.logsigmoid(0.5 * (first.sort().values - second.sort().values)).mean()
    torch.testing.assert_close(call(name, inputs, beta=0.5).loss, expected)


def test_a_hopeless_pair_keeps_a_gradient_where_an_exponential_is_bounded():
    """If e^(−z) were clamped, it would have no gradient where the loss is largest."""
    chosen = torch.tensor([-1000.0], requires_grad=True)
    by_log_ratios("gpo", chosen, torch.zeros(1), beta=1.0, function="exponential").losses.sum().backward()
    assert chosen.grad.isfinite().all() and chosen.grad < 0
