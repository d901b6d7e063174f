"""Losses of single responses, triples and lists: values derived by hand, and the pair losses that they reduce to."""

import math

import numpy as np
import pytest
import torch

from hf_prefopt.kinds import PAIRS, TRIPLES
from hf_prefopt.kinds.made_up import made_up_inputs
from hf_prefopt.losses import get_loss, kto_weights, tpo_l_loss, tpo_loss
from hf_prefopt.objective.build import build_objective
from tests.losses.pairs import by_log_ratios, vector


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def unpaired(name, ratios, labels, mismatched=None, **params):
    """Return the loss of responses with these log-ratios to a reference of zeros."""
    values = {"policy_logps": vector(*ratios), "policy_mismatched_logps": vector(*(mismatched or ratios))}
    values |= {key.replace("policy", "ref"): torch.zeros_like(value) for key, value in values.items()}
    values["labels"] = torch.tensor(labels)
    spec = get_loss(name)
    return spec(**{key: values[key] for key in spec.inputs}, **params)


def listed(name, ratios, **params):
    """Return the loss of one list with these log-ratios, best first, with scores decreasing linearly from 1 to 0."""
    k = len(ratios)
    values = {
        "policy_list_logps": vector(*ratios)[None],
        "ref_list_logps": torch.zeros(1, k, dtype=torch.float64),
        "list_lengths": torch.ones(1, k),
        "list_mask": torch.ones(1, k, dtype=torch.bool),
        "list_ranks": torch.arange(k)[None].double(),
        "list_scores": torch.linspace(1, 0, k, dtype=torch.float64)[None],
    }
    spec = get_loss(name)
    return spec(**{key: values[key] for key in spec.inputs}, **params).losses.item()


@pytest.mark.parametrize(("mismatched", "z"), [((4, 0), 2), ((-4, 0), 0)])
def test_kto_by_hand(mismatched, z):
    """r = (3, −1), β = 1; mismatched (4, 0) give z = 2 and (−4, 0) z = 0: 1 − σ(3 − z), 1 − σ(z + 1)."""
    output = unpaired("kto", (3, -1), (True, False), mismatched, beta=1.0)
    torch.testing.assert_close(output.losses, vector(1 - sigmoid(3 - z), 1 - sigmoid(z + 1)))
    assert output.components["kl"].tolist() == [z, z]


@pytest.mark.parametrize("name", ["kto", "bco", "apo_zero_unpaired", "npo", "sft_unpaired"])
@pytest.mark.parametrize("label", [True, False])
def test_a_batch_of_one_class_is_finite(name, label):
    inputs = made_up_inputs() | {"labels": torch.full((5,), label)}
    objective = build_objective([name])
    objective.update_state(inputs)
    assert objective(inputs).losses.isfinite().all()


def test_no_gradient_goes_through_ktos_baseline():
    inputs = {key: value.requires_grad_(value.is_floating_point()) for key, value in made_up_inputs().items()}
    spec = get_loss("kto")
    spec(**{key: inputs[key] for key in spec.inputs}).losses.sum().backward()
    assert inputs["policy_mismatched_logps"].grad is None


def test_npo_forgets_and_leaves_the_rest_alone():
    """r = 0: (2/β) log 2 for a response to forget, and 0 for a response to retain; β = 0.5 gives 4 log 2."""
    assert unpaired("npo", (0, 0), (False, True), beta=0.5).losses.tolist() == pytest.approx([4 * math.log(2), 0])


@pytest.mark.parametrize(("pair", "single"), [("apo_zero", "apo_zero_unpaired"), ("bco_pair", "bco")])
def test_a_pair_is_two_examples(pair, single):
    """The loss of a pair is the sum of the losses of its responses; BCO's δ is the mean of all rewards in both
    cases."""
    pairs = by_log_ratios(pair, vector(2.0, -0.5), vector(-1.0, 1.0), beta=0.7).losses.sum()
    singles = unpaired(single, (2, -0.5, -1, 1), (True, True, False, False), beta=0.7).losses.sum()
    torch.testing.assert_close(pairs, singles)


def test_bcos_delta_is_the_mean_of_all_that_training_has_seen():
    """β = 1: batches of rewards (1, 3) and (5, 5, 5) give δ = 2 and then 19/5; computing the loss does not change δ."""
    objective = build_objective(["bco"], shared_params={"beta": 1.0})

    def batch(*rewards):
        labels = torch.ones(len(rewards), dtype=torch.bool)
        return {"policy_logps": vector(*rewards), "ref_logps": torch.zeros(len(rewards)).double(), "labels": labels}

    for rewards, delta in (((1, 3), 2.0), ((5, 5, 5), 3.8)):
        objective.update_state(batch(*rewards))
        assert objective.state_dict()["bco"]["delta"] == pytest.approx(delta)
    for _ in range(2):
        assert objective(batch(4.0)).losses.item() == pytest.approx(-math.log(sigmoid(4 - 3.8)))
    other = build_objective(["bco"], shared_params={"beta": 1.0})
    other.load_state_dict(objective.state_dict())
    assert other.state_dict() == objective.state_dict()


@pytest.mark.parametrize(
    ("lists", "pair"), [("plackett_luce", "dpo"), ("s_dpo", "dpo"), ("infonca", "dpo"), ("nca", "nca_pair")]
)
def test_lists_of_two_are_pairs(lists, pair):
    r_w, r_l = vector(2.0, -0.5, 0.0), vector(-1.0, 1.0, 0.0)
    expected = by_log_ratios(pair, r_w, r_l, beta=0.3).losses
    torch.testing.assert_close(by_log_ratios(lists, r_w, r_l, beta=0.3).losses, expected)


def ranked(name, log_ratios, ranks):
    """Return the loss of one list with these ranks, one token per response, and hyperparameters set to 1."""
    spec, values = get_loss(name), torch.tensor([log_ratios]).double()
    given = {
        "policy_list_logps": values,
        "ref_list_logps": torch.zeros_like(values),
        "list_lengths": torch.ones_like(values),
        "list_ranks": ranks,
        "list_mask": torch.ones_like(values, dtype=torch.bool),
    }
    settings = {"beta": 1.0} if "beta" in spec.defaults else {}
    return spec(**{key: given[key] for key in spec.inputs}, **settings).losses.item()


def test_lists_of_equal_responses_by_hand():
    """Three equal responses: 3! orders are equally likely, log 6; one best response of three, log 3. InfoNCA's and
    NCA's scores (1, ½, 0) put all weight on the best: log 3, and log 2 + log 2.
    """
    expected = {"plackett_luce": math.log(6), "s_dpo": math.log(3), "infonca": math.log(3), "nca": 2 * math.log(2)}
    assert {name: listed(name, (0, 0, 0)) for name in expected} == pytest.approx(expected)


def test_equally_good_responses_by_hand():
    """Two best responses have log-ratios 0 and 1, and a worse one has 2, with β = 1. Each best response is compared
    only with the worse one. Log-probs per token equal the log-ratios, so the NLL of the best is −½.
    """
    ranks = torch.tensor([[1.0, 1.0, 3.0]]).double()
    against_worst = [-math.log(sigmoid(0 - 2)), -math.log(sigmoid(1 - 2))]
    expected = {
        "plackett_luce": sum(against_worst),
        "s_dpo": sum(against_worst) / 2,
        "rrhf": (2 - 0) + (2 - 1) - 0.5,
        "sft_lists": -0.5,
    }
    found = {name: ranked(name, (0, 1, 2), ranks) for name in expected}
    assert found == pytest.approx(expected)


def test_lipo_before_the_first_step_is_the_mean_over_all_orders():
    """All rewards are 0, gains 2, 1.5 and 1: each pair has the mean of |D_p − D_q| over places, times log 2."""
    discounts = [1 / math.log(1 + place) for place in (1, 2, 3)]
    apart = sum(abs(a - b) for a in discounts for b in discounts) / 6
    scores = torch.tensor([[math.log2(2.0), math.log2(1.5), 0.0]]).double()
    zero, mask = torch.zeros(1, 3).double(), torch.ones(1, 3, dtype=torch.bool)
    given = {"policy_list_logps": zero, "ref_list_logps": zero, "list_scores": scores, "list_mask": mask}
    loss = get_loss("lipo")(**given, beta=1.0).losses
    assert loss.item() == pytest.approx((0.5 + 1.0 + 0.5) * apart * math.log(2))


def test_exo_vanishes_where_the_policy_is_the_target():
    """βr = R/τ up to a constant."""
    assert listed("exo_rw", (7, 6.5, 6), beta=1.0, tau=1.0) == pytest.approx(0, abs=1e-12)


def test_rrhf_by_hand():
    """s̄ = (−3, −1, −2), best first: max(0, 2) + max(0, 1) + max(0, −1) = 3, and λ = ½ of the best's NLL of 3."""
    assert listed("rrhf", (-3, -1, -2), sft_coef=0.5) == pytest.approx(3 + 1.5)


def test_lipo_by_hand():
    """β = 1, r = (0, 1), R = (1, 0): the policy ranks the worse one first. Gains 2 and 1 differ by 1, discounts by
    1/log 2 − 1/log 3; times ℓ(−1)."""
    weight = 1 / math.log(2) - 1 / math.log(3)
    assert listed("lipo", (0, 1), beta=1.0) == pytest.approx(weight * -math.log(sigmoid(-1)))


def test_lipo_stretches_scores_on_request():
    """Scores times ten plus 3 are the same scores after rescaling each list to [0, 1]."""
    inputs = made_up_inputs()
    spec = get_loss("lipo")
    given = {key: inputs[key] for key in spec.inputs}
    large = {**given, "list_scores": 10 * given["list_scores"] + 3}
    expected = spec(**given, normalize_scores=True).losses
    torch.testing.assert_close(spec(**large, normalize_scores=True).losses, expected)


@pytest.mark.parametrize(("counts", "weights"), [((100, 80), (1, 1)), ((100, 200), (2, 1)), ((300, 100), (1, 2.25))])
def test_kto_weights_bring_the_ratio_into_its_range(counts, weights):
    assert kto_weights(*counts) == pytest.approx(weights)
    assert 1 <= round(counts[0] * weights[0] / (counts[1] * weights[1]), 9) <= 4 / 3 + 1e-9


def test_kinds_that_no_data_set_holds_at_once_are_refused():
    with pytest.raises(
        ValueError,
        match=r"kto needs rows with `label`, or pairs with unpair=True, .*; dpo needs pairs",
    ):
        build_objective(["kto", "dpo"])
    with pytest.raises(ValueError, match="plackett_luce compares lists"):
        build_objective(["plackett_luce"], use_weighting=True)


@pytest.mark.parametrize(
    ("name", "policy", "reference"),
    [
        ("bco", ("policy_logps",), ("ref_logps",)),
        ("bco_pair", ("policy_chosen_logps", "policy_rejected_logps"), ("ref_chosen_logps", "ref_rejected_logps")),
    ],
)
def test_delta_over_unequal_batches_equals_numpy(name, policy, reference):
    """After batches of 2, 7 and 4 examples, δ is the plain mean of all rewards, for pairs of both responses, including
    the current batch, whose loss uses this δ. An evaluation does not change it."""
    objective, rewards = build_objective([name], shared_params={"beta": 0.3}), []
    for seed, count in enumerate((2, 7, 4)):
        inputs = made_up_inputs(pairs=count, seed=seed)
        objective.update_state(inputs)
        own = [0.3 * (inputs[p] - inputs[r]).numpy() for p, r in zip(policy, reference, strict=True)]
        rewards += own
        delta = np.concatenate(rewards).mean()
        assert objective.state_dict()[name]["delta"] == pytest.approx(delta, rel=1e-12)
        if name == "bco":
            expected = np.logaddexp(0, np.where(inputs["labels"], delta - own[0], own[0] - delta))
        else:
            expected = np.logaddexp(0, delta - own[0]) + np.logaddexp(0, own[1] - delta)
        for training in (True, False):
            found = objective(inputs, training=training).losses
            torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-12, atol=0)
    assert objective.state_dict()[name]["count"] == 13 * len(policy)


def test_losses_of_pairs_join_those_of_triples():
    """Triples are pairs, too: 0.5 tpo + 2 dpo + 0.3 sft is that sum; weighting pairs raises an error with tpo."""
    inputs = made_up_inputs()
    objective = build_objective(["dpo", "tpo"], [2.0, 0.5], sft_weight=0.3)
    assert objective.kind is TRIPLES and build_objective(["dpo"]).kind is PAIRS
    parts = {name: build_objective([name])(inputs).losses for name in ("dpo", "tpo", "sft")}
    torch.testing.assert_close(objective(inputs).losses, 2 * parts["dpo"] + 0.5 * parts["tpo"] + 0.3 * parts["sft"])
    with pytest.raises(ValueError, match="weights preference pairs, but tpo compares triples"):
        build_objective(["dpo", "tpo"], use_weighting=True)


def test_tpo_by_hand():
    """s = (−2, −4), β = ½, γ = ¼, the gold response −6 nats in four tokens, α = 2: ℓ(1) + 3 for the sums; for the means
    over two and four tokens, both −1, ℓ(−¼) + 3."""
    given = {"policy_chosen_logps": vector(-2), "policy_rejected_logps": vector(-4), "policy_gold_logps": vector(-6)}
    lengths = {"chosen_lengths": vector(2), "rejected_lengths": vector(4), "gold_lengths": vector(4)}
    tpo = tpo_loss(**given, gold_lengths=lengths["gold_lengths"], beta=0.5, tpo_alpha=2.0)
    tpo_l = tpo_l_loss(**given, **lengths, beta=0.5, gamma=0.25, tpo_alpha=2.0)
    assert tpo.losses.item() == pytest.approx(-math.log(sigmoid(1.0)) + 3)
    assert tpo_l.losses.item() == pytest.approx(-math.log(sigmoid(-0.25)) + 3)
    assert tpo.rewards.tolist() == [[-1, -2]] and tpo_l.rewards.tolist() == [[-0.5, -0.5]]


def test_tpo_with_the_chosen_response_for_gold_is_cpo():
    """TPO-L is then SimPO with the NLL of the chosen response."""
    inputs = made_up_inputs()
    inputs |= {"policy_gold_logps": inputs["policy_chosen_logps"], "gold_lengths": inputs["chosen_lengths"]}
    for loss, parents, params in (("tpo", ["cpo"], {}), ("tpo_l", ["simpo", "sft"], {"simpo": {"gamma": 0.5}})):
        expected = build_objective(parents, loss_params=params, shared_params={"beta": 0.3})(inputs)
        found = build_objective([loss], shared_params={"beta": 0.3})(inputs)
        torch.testing.assert_close(found.losses, expected.losses)
        torch.testing.assert_close(found.rewards, expected.rewards)


def test_sft_joins_either_kind():
    """In combination with a loss of single responses, `sft` is the NLL of the desirable responses."""
    inputs = made_up_inputs()
    output = build_objective(["npo"], sft_weight=0.5)(inputs)
    nll = -inputs["policy_logps"] / inputs["lengths"] * inputs["labels"]
    npo = get_loss("npo")(**{key: inputs[key] for key in get_loss("npo").inputs})
    torch.testing.assert_close(output.losses, npo.losses + 0.5 * nll)
