"""β-DPO and α-DPO: their moving averages, their draws, and the losses that they reduce to."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from hf_prefopt.kinds.made_up import made_up_inputs
from hf_prefopt.losses import alpha_dpo_loss, beta_dpo_loss, get_loss
from hf_prefopt.objective.build import build_objective
from hf_prefopt.testing import call
from tests.losses import numpy_reference
from tests.losses.pairs import vector
from tests.tiny_models import perturbed, tiny_model
from tests.trainers import make_trainer, pairs


def pairs_of(margins, rows=None, lengths=1.0):
    """Inputs for pairs with these h and a reference of zeros."""
    h = vector(*margins)
    zeros = torch.zeros_like(h)
    return {
        "policy_chosen_logps": h,
        **dict.fromkeys(("policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps"), zeros),
        "rows": torch.arange(len(h)) if rows is None else torch.tensor(rows),
        "pair_in_row": torch.zeros(len(h), dtype=torch.int64),
        **dict.fromkeys(("chosen_lengths", "rejected_lengths"), torch.full_like(h, lengths)),
    }


@pytest.mark.parametrize("name", ["beta_dpo", "alpha_dpo"])
def test_the_running_mean_and_spread_by_hand(name):
    """Batches (1, 3), mean 2 and spread √2, and (5, 5, 8), mean 6 and spread √3. With
    a decay of 0.9 from 0, μ = 0.2 and then 0.18 + 0.6, and σ = 0.1√2 and then 0.09√2 +
    0.1√3. A single pair has no spread. Computing the loss does not change the state.
    """
    objective = build_objective([name])
    expected = [(0.2, 0.1 * 2**0.5), (0.78, 0.09 * 2**0.5 + 0.1 * 3**0.5), (0.9 * 0.78 + 0.4, None)]
    for margins, (mean, std) in zip(((1, 3), (5, 5, 8), (4,)), expected, strict=True):
        objective.update_state(pairs_of(margins))
        objective(pairs_of(margins))
        state = objective.state_dict()[name]
        assert state["mean"] == pytest.approx(mean)
        assert std is None or state["std"] == pytest.approx(std)
    assert state["std"] == pytest.approx(0.9 * (0.09 * 2**0.5 + 0.1 * 3**0.5))
    assert state["batches"] == 3


@pytest.mark.parametrize("name", ["beta_dpo", "alpha_dpo"])
def test_beside_a_state_equals_numpy(name):
    """The moving averages of earlier batches replace the batch's own statistics."""
    inputs = made_up_inputs()
    state = {"mean": torch.tensor(0.7), "std": torch.tensor(1.9), "batches": torch.tensor(41.0)}
    arguments = {numpy_reference.SHORT[key]: inputs[key].numpy() for key in get_loss(name).inputs}
    known = (0.7, 1.9, 41)[: 3 if name == "beta_dpo" else 2]
    losses, _ = getattr(numpy_reference, name)(**arguments, state=known)
    found = call(name, inputs, state={key: value.double() for key, value in state.items()}).losses
    torch.testing.assert_close(found, torch.tensor(losses), rtol=1e-7, atol=0)  # the state is written in fp32


def test_alpha_dpo_by_hand():
    """One token, β = 1, γ = ½, α = ¼, μ = 1, σ = 2: h = 3 gives z = 1, ℓ(3 − ¾)."""
    state = {"mean": vector(1.0)[0], "std": vector(2.0)[0]}
    output = call("alpha_dpo", pairs_of([3.0]), beta=1.0, gamma=0.5, alpha=0.25, state=state)
    assert output.losses.item() == pytest.approx(math.log1p(math.exp(-2.25)))
    assert output.components["target"].item() == pytest.approx(0.75)


def test_alpha_dpo_without_alpha_is_simpo():
    inputs = made_up_inputs()
    simpo = call("simpo", inputs, beta=10.0, gamma_beta_ratio=0.4).losses
    torch.testing.assert_close(call("alpha_dpo", inputs, alpha=0.0).losses, simpo)


def test_beta_dpo_by_hand():
    """All pairs are kept: h = (1, 3), μ = 1, a = ½, β = 0.2: β_b = 0.2(1 + ½(2 − 1))
    = 0.3. Far below μ, β_b is 10⁻³.
    """
    state = {"mean": vector(1.0)[0], "std": vector(1.0)[0], "batches": vector(0.0)[0]}
    given = {"beta": 0.2, "a": 0.5, "rho": 0.0, "state": state}
    output = call("beta_dpo", pairs_of([1, 3]), **given)
    assert output.losses.tolist() == pytest.approx([math.log1p(math.exp(-0.3)), math.log1p(math.exp(-0.9))])
    assert call("beta_dpo", pairs_of([-9, -9]), **given).components["beta"].tolist() == pytest.approx([1e-3] * 2)


def test_beta_dpo_that_keeps_all_at_one_beta_is_dpo():
    inputs = made_up_inputs()
    torch.testing.assert_close(call("beta_dpo", inputs, a=0.0, rho=0.0).losses, call("dpo", inputs).losses)


@pytest.mark.parametrize(("count", "rho", "kept"), [(5, 0.2, 4), (10, 0.2, 8), (7, 0.5, 3), (1, 0.2, 1), (3, 0.9, 1)])
def test_so_many_pairs_are_kept_and_the_mean_is_theirs(count, rho, kept):
    """int(B(1 − ρ)) pairs, at least one, are kept; the mean loss is the mean of ℓ over them; all have rewards."""
    inputs = made_up_inputs(pairs=count)
    output = call("beta_dpo", inputs, a=0.0, rho=rho)
    chosen = output.components["kept"].bool()
    assert chosen.sum() == kept
    dpo = call("dpo", inputs)
    torch.testing.assert_close(output.loss, dpo.losses[chosen].mean())
    assert output.losses[~chosen].abs().sum() == 0
    torch.testing.assert_close(output.rewards, dpo.rewards)


def test_an_evaluation_keeps_all_pairs(tmp_path):
    """After two steps, the evaluation keeps all seven rows, of which training would drop
    two. For every batch size, it equals the mean of ℓ(β_b h) over all seven rows in
    NumPy, with β_b = 0.1(1 + 0.6(mean h − μ)) and μ from training, and does not change μ.
    """
    model = {"model": perturbed(tiny_model(), scale=0.05), "ref_model": tiny_model()}
    trainer = make_trainer(tmp_path, **model, loss_type="beta_dpo", loss_params={"rho": 0.4}, max_steps=2)
    trainer.train()
    state, rows = trainer.criterion.state_dict(), pairs(7, seed=2)
    found = []
    for size in (7, 2):
        trainer.args.per_device_eval_batch_size = size
        found.append(trainer.evaluate(rows))
    rewards = trainer.predict(rows).predictions.astype(np.float64)
    margins = (rewards[:, 0] - rewards[:, 1]) / 0.1
    beta = 0.1 * (1 + 0.6 * (margins.mean() - state["beta_dpo"]["mean"]))
    for metrics in found:
        assert metrics["eval_loss"] == pytest.approx(np.logaddexp(0, -beta * margins).mean(), rel=1e-5)
        assert metrics["eval_loss/beta_dpo_kept"] == 1
        assert metrics["eval_loss/beta_dpo_beta"] == pytest.approx(beta, rel=1e-5)
    assert trainer.criterion.state_dict() == state


def test_pairs_are_drawn_by_their_weights():
    """Two of h = (0, 0, 2, 4) at μ = 0, σ = 2: weights 1, 1, e^−½, e^−2, drawn one after the other. Over 1,500 batches
    the frequency of each is within four standard deviations (½/√1500) of the sum over all orders of two."""
    weights = [1.0, 1.0, math.exp(-0.5), math.exp(-2.0)]
    total = sum(weights)
    expected = [
        w / total + sum(v / total * w / (total - v) for j, v in enumerate(weights) if j != i)
        for i, w in enumerate(weights)
    ]
    counts = Counter()
    for batch in range(1500):
        state = {"mean": vector(0.0)[0], "std": vector(2.0)[0], "batches": vector(batch)[0]}
        kept = call("beta_dpo", pairs_of([0, 0, 2, 4]), rho=0.5, state=state).components["kept"]
        counts.update(kept.nonzero().flatten().tolist())
    for pair, share in enumerate(expected):
        assert counts[pair] / 1500 == pytest.approx(share, abs=4 * 0.5 / 1500**0.5)


def test_a_draw_is_of_the_batch_and_of_the_pairs():
    """The same pairs are kept after a permutation; the kept pairs differ after more
    batches, or with other row numbers.
    """
    inputs = pairs_of(range(12), rows=range(100, 112))

    def kept(batches=0.0, order=None, shift=0):
        order = torch.arange(12) if order is None else order
        state = {"mean": vector(5.0)[0], "std": vector(9.0)[0], "batches": vector(batches)[0]}
        given = {key: value[order] for key, value in inputs.items()} | {"rows": inputs["rows"][order] + shift}
        drawn = call("beta_dpo", given, rho=0.5, state=state).components["kept"].bool()
        return {*inputs["rows"][order][drawn].tolist()}

    assert kept() == kept(order=torch.arange(11, -1, -1))
    assert len({frozenset(kept(batches)) for batches in range(5)}) == 5
    assert kept() != kept(shift=50)


@pytest.mark.parametrize("loss", [beta_dpo_loss, alpha_dpo_loss])
def test_equal_margins_are_finite(loss):
    """At the reference, all margins and their spread are 0. The loss does not divide by 0, and has a gradient."""
    inputs = pairs_of([0.0] * 4)
    inputs["policy_chosen_logps"].requires_grad_()
    output = loss(**{key: inputs[key] for key in get_loss(loss.__name__[:-5]).inputs})
    output.losses.sum().backward()
    assert output.losses.isfinite().all()
    assert inputs["policy_chosen_logps"].grad.isfinite().all() and inputs["policy_chosen_logps"].grad.abs().sum() > 0
