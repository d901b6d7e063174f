"""What every registered loss must fulfil. The tests run over the registry, so a new loss cannot be left out."""

import inspect
import itertools
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from hf_prefopt.examples import LISTS, PAIRS, UNPAIRED
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
    "desirable_weight": 1.7,
    "undesirable_weight": 0.6,
    "log_form": True,
    "sft_coef": 0.4,
    "tau": 0.3,
    "normalize_scores": True,
    "a": 0.1,
    "rho": 0.5,
    "eta": 0.6,
    "margin": "ratio",
    "seed": 3,
    "dispersion_scale": 0.6,
}
# Where that value is out of a loss's range, or its default.
OTHER_VALUES_OF = {
    "r_dpo": {"alpha": 0.6},
    "slic_hf": {"length_normalize": True},
    "infonca": {"alpha": 0.3},
    "nca": {"alpha": 0.3},
    "alpha_dpo": {"alpha": 0.6},
    "odpo": {"alpha": 0.6},
    "tdpo2": {"alpha": 0.2},
}
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
    "nca",  # every response is a noise sample too
    "exo_rw",  # a KL to soft labels
    "rpo_bwd",  # a KL to soft labels
    "rpo_fwd",  # a KL to soft labels
    "rpo_sq",  # a square: past its target
    "sppo",  # squares: past their targets
}
# Losses defined as another where a hyperparameter is at its default: told apart at a value away from it.
TOLD_APART_BY = {
    "gpo": {"function": "exponential"},
    "infonca": {"alpha": 0.3},  # at α → 0 all is on the best response: softmax DPO
}
# For each kind of examples: the log-probs that losses of them may read.
POLICY_LOGPS = {
    PAIRS: (
        "policy_chosen_logps",
        "policy_chosen_token_logps",
        "policy_rejected_logps",
        "policy_rejected_token_logps",
    ),
    UNPAIRED: ("policy_logps",),
    LISTS: ("policy_list_logps",),
}


def other_values(name):
    """For each hyperparameter of the loss: that one alone, away from its default."""
    values = OTHER_VALUES | OTHER_VALUES_OF.get(name, {})
    return [{key: values[key]} for key in get_loss(name).defaults]


def call(name, inputs, **params):
    spec = get_loss(name)
    return spec(**{key: inputs[key] for key in spec.inputs if key in inputs}, **params)


def gradients(name, inputs):
    """The gradients in the policy's log-probs, end to end, 0 where a loss does not read them."""
    read = [inputs[key] for key in POLICY_LOGPS[get_loss(name).kind]]
    return torch.cat([(torch.zeros_like(x) if x.grad is None else x.grad).flatten() for x in read])


def with_gradients(inputs):
    """The same inputs, the policy's log-probs as leaves that record gradients."""
    return {key: value.requires_grad_("policy" in key and "logps" in key) for key, value in inputs.items()}


def expected(name, inputs, **params):
    given = [key for key in get_loss(name).inputs if key in inputs]
    arguments = {numpy_reference.SHORT[key]: inputs[key].numpy() for key in given}
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


@pytest.mark.parametrize(
    ("name", "column"), [(name, column) for name in LOSSES for column in get_loss(name).optional_columns]
)
def test_equals_the_paper_with_a_further_column(name, column):
    """A column that a loss can do without, where the data have it, beside ε, too."""
    inputs = made_up_inputs()
    inputs[column] = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = call(name, made_up_inputs()).losses
    for params in [{}, *([{"label_smoothing": 0.2}] if "label_smoothing" in get_loss(name).defaults else [])]:
        output, (losses, rewards) = call(name, inputs, **params), expected(name, inputs, **params)
        np.testing.assert_allclose(output.losses.numpy(), losses, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(output.rewards.numpy(), rewards, rtol=1e-12, atol=1e-12)
        assert (output.losses != plain).any()
    for wrong in (inputs[column][:1], inputs[column][:, None]):
        with pytest.raises(ValueError, match="vectors"):
            call(name, {**inputs, column: wrong})


@pytest.mark.parametrize("name", LOSSES)
def test_every_hyperparameter_is_used(name):
    """A hyperparameter that is given changes the loss or its gradient: none is accepted and ignored."""

    def loss_and_gradient(**params):
        inputs = with_gradients(made_up_inputs())
        losses = call(name, inputs, **params).losses
        losses.sum().backward()
        return torch.cat([losses.detach(), gradients(name, inputs)])

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
    """Float64 gradcheck of the losses with respect to the policy's log-probs, detached parts held at their values."""
    inputs = made_up_inputs()
    policy = [key for key in get_loss(name).inputs if key.startswith("policy") and key.endswith("logps")]

    def losses(*values):
        with held.replayed():
            return call(name, {**inputs, **dict(zip(policy, values, strict=True))}, **params).losses

    for params in [{}, *other_values(name)]:
        held = DetachedValues()
        assert torch.autograd.gradcheck(losses, [inputs[key].clone().requires_grad_() for key in policy]), params


class DetachedValues:
    """What `detach` returned, call by call, the first time: from then on it returns that again."""

    def __init__(self):
        self._values = None

    @contextmanager
    def replayed(self):
        values, detach, known = [], torch.Tensor.detach, self._values

        def replay(tensor):
            values.append(detach(tensor).clone() if known is None else known[len(values)])
            return values[-1]

        torch.Tensor.detach = replay
        try:
            yield
        finally:
            torch.Tensor.detach, self._values = detach, values


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in RISING])
def test_raising_the_chosen_response_never_raises_the_loss(name):
    """dL/ds ≤ 0 of what is preferred and ≥ 0 of what is not, for every example; of lists, of the best and the worst."""
    inputs = with_gradients(made_up_inputs(pairs=50))
    call(name, inputs).losses.sum().backward()
    found = gradients(name, inputs)
    kind = get_loss(name).kind
    if kind is PAIRS:
        preferred, other = found.chunk(2)
    elif kind is UNPAIRED:
        preferred, other = found[inputs["labels"]], found[~inputs["labels"]]
    else:
        by_rank = inputs["list_ranks"].masked_fill(~inputs["list_mask"], torch.inf)
        last = inputs["list_ranks"].masked_fill(~inputs["list_mask"], -torch.inf).argmax(1, keepdim=True)
        found = found.view_as(by_rank)
        preferred, other = found.gather(1, by_rank.argmin(1, keepdim=True)), found.gather(1, last)
    assert (preferred <= 0).all() and (other >= 0).all()


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
    for key in [key for key in get_loss(name).inputs if key in inputs]:
        for wrong in (inputs[key][:1], inputs[key][:, None]):
            if get_loss(name).kind is LISTS:
                wrong = {1: inputs[key][:, :1], 2: inputs[key][:, 0]}[1 if wrong.dim() == 2 else 2]
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
    for side, direction in (("chosen", sign), ("rejected", -sign)):
        shift = 1000 / far[f"{side}_lengths"] * direction
        moved = (far[f"ref_{side}_token_logps"] + shift[:, None]) * far[f"{side}_token_mask"]
        far[f"policy_{side}_token_logps"] = moved.requires_grad_()
    far["policy_logps"] = (far["ref_logps"] + 1000 * sign).requires_grad_()
    signs = sign[:, None] * torch.tensor([1.0, -1.0, 1.0, -1.0])
    far["policy_list_logps"] = (far["ref_list_logps"] + 1000 * signs).requires_grad_()
    output = call(name, far)
    output.losses.sum().backward()
    assert output.losses.isfinite().all()
    assert output.rewards is None or output.rewards.isfinite().all()
    assert gradients(name, far).isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_fp32_is_enough_for_long_responses(name):
    """2,000 tokens and −3,000 nats in fp32, where e^s underflows: losses within what rounding s to 1e-4 explains."""
    inputs = made_up_inputs()
    for side in ("chosen", "rejected"):
        inputs[f"{side}_lengths"] = inputs[f"{side}_lengths"] + 2000
    for key in ("lengths", "list_lengths"):
        inputs[key] = inputs[key] + 2000
    for key in [key for key in inputs if key.endswith("logps")]:
        inputs[key] = inputs[key] - (100 if "token" in key else 3000)
    single = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    torch.testing.assert_close(
        call(name, single).losses.double(), call(name, inputs).losses, rtol=2e-3, atol=2e-4, check_dtype=False
    )


@pytest.mark.parametrize(
    "name", [name for name in LOSSES if {"chosen_lengths", "lengths", "list_lengths"} & {*get_loss(name).inputs}]
)
def test_an_empty_response_is_no_division_by_zero(name):
    """An empty response (length 0, sum 0) gives finite losses and gradients."""
    inputs = made_up_inputs()
    empty = {
        key: torch.zeros_like(value) if "lengths" in key or "logps" in key else value for key, value in inputs.items()
    }
    empty = with_gradients(empty)
    losses = call(name, empty).losses
    losses.sum().backward()
    assert losses.isfinite().all() and gradients(name, empty).isfinite().all()


@pytest.mark.parametrize("name", [name for name in LOSSES if get_loss(name).kind is LISTS])
def test_padding_of_lists_is_never_looked_at(name):
    """Whatever stands there, one column more of it or none where no list needs it: same losses, no gradient there."""
    inputs = with_gradients(made_up_inputs())
    losses = call(name, inputs).losses
    losses.sum().backward()
    mask = inputs["list_mask"]
    assert (inputs["policy_list_logps"].grad[~mask] == 0).all()
    other = {key: x.detach() for key, x in inputs.items() if "list" in key}
    wild = {key: x if key == "list_mask" else x.masked_fill(~mask, 3) for key, x in other.items()}
    wider = {key: torch.nn.functional.pad(x, (0, 1)) for key, x in other.items()}
    for same in (wild, wider):
        torch.testing.assert_close(call(name, same).losses, losses.detach(), rtol=1e-14, atol=0)
    short = {key: x[:1, :2] for key, x in other.items()}
    torch.testing.assert_close(call(name, short).losses, losses[:1].detach(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", [name for name in LOSSES if get_loss(name).kind is LISTS])
def test_the_order_within_a_list_does_not_matter(name):
    """Responses in another order, with their ranks and scores: the same losses, the rewards in that order."""
    inputs = {key: x for key, x in made_up_inputs().items() if "list" in key}
    order = torch.tensor([2, 0, 3, 1])
    output, moved = call(name, inputs), call(name, {key: x[:, order] for key, x in inputs.items()})
    torch.testing.assert_close(moved.losses, output.losses, rtol=1e-13, atol=0)
    if output.rewards is not None:
        torch.testing.assert_close(moved.rewards, output.rewards[:, order], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", [name for name in LOSSES if any("token" in key for key in get_loss(name).inputs)])
def test_the_width_of_token_tensors_does_not_matter(name):
    """Columns of zeros behind the longest response, as a longer one elsewhere in the batch makes them, and none there:
    the same losses, to the order in which zeros are added."""
    inputs = made_up_inputs()
    longest = max(inputs[f"{side}_lengths"].max() for side in ("chosen", "rejected"))
    for width in (longest, 3 * longest):
        resized = {
            key: torch.nn.functional.pad(x, (0, width - x.shape[1])) if "token" in key else x
            for key, x in inputs.items()
        }
        torch.testing.assert_close(call(name, resized).losses, call(name, inputs).losses, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_stands_as_an_objective(name):
    """What a configuration of that one loss computes is the loss, and a bad hyperparameter is refused with the name."""
    inputs = made_up_inputs()
    objective = build_objective([name])
    objective.update_state(inputs)
    state = {"state": objective.state[name]} if name in objective.state else {}
    torch.testing.assert_close(objective(inputs).losses, call(name, inputs, **state).losses, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match=f"{name} takes"):
        build_objective([name], loss_params={"no_such_parameter": 1.0})


@pytest.mark.parametrize("name", LOSSES)
def test_documents_itself(name):
    """Formula first, the source, and what it raises."""
    docstring = inspect.getdoc(get_loss(name).function)
    assert "Raises" in docstring
    assert get_loss(name).description
    assert name.startswith("sft") or get_loss(name).paper
