"""Checks that every loss must pass. A check takes the name of a registered loss, and optionally hyperparameters.

A check calls the loss on synthetic examples of the kind that the loss compares, and raises `AssertionError` if the loss
fails the check. `loss_checks` returns the checks that apply to a loss, depending on its inputs and properties.
"""

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hf_prefopt.kinds import LISTS, PAIRS, SCORED, TRIPLES, UNPAIRED
from hf_prefopt.kinds.lists import best_of
from hf_prefopt.kinds.made_up import made_up_inputs
from hf_prefopt.losses.base import LossOutput
from hf_prefopt.losses.registry import LossSpec, get_loss
from hf_prefopt.objective.build import build_objective

Check = Callable[..., None]
# For each kind of examples, the policy log-probs that its losses may read. Those of preferred responses come first.
POLICY_LOGPS = {
    PAIRS: ("policy_chosen_logps", "policy_chosen_token_logps", "policy_rejected_logps", "policy_rejected_token_logps"),
    TRIPLES: ("policy_chosen_logps", "policy_gold_logps", "policy_rejected_logps"),
    UNPAIRED: ("policy_logps",),
    SCORED: ("policy_logps",),
    LISTS: ("policy_list_logps",),
}
_CHECKS: list[tuple[Check, Callable[[LossSpec], bool]]] = []


def loss_checks(name: str) -> list[Check]:
    """Return the checks that apply to a loss. Call each with the loss's name, and optionally with hyperparameters.

    Among other things, the checks compare gradients with finite differences and fp32 with float64. They also compare
    the loss of an example alone and in a batch, and try extreme values and empty responses.

    Example:
        ```python
        for check in loss_checks("my_loss"):
            check("my_loss", beta=0.5)
        ```

    Args:
        name: The name of a registered loss.

    Returns:
        Functions `(name, **hyperparameters)` that raise `AssertionError` if the loss fails the check.

    Raises:
        ValueError: If no loss with that name is registered.
    """
    spec = get_loss(name)
    return [check for check, applies in _CHECKS if applies(spec)]


def _check(applies: Callable[[LossSpec], bool] = lambda spec: True) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        _CHECKS.append((check, applies))
        return check

    return register


def call(name: str, inputs: Mapping[str, Tensor], **params: Any) -> LossOutput:
    """Call a loss with those of the `inputs` that it requires.

    Pass its hyperparameters and its inputs from optional columns as keywords.
    """
    spec = get_loss(name)
    needed = [key for key in spec.inputs if key not in spec.optional_inputs]
    return spec(**{key: inputs[key] for key in needed if key in inputs}, **params)


def gradients(name: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the gradients with respect to the policy's log-probs, concatenated in the order of `POLICY_LOGPS`.

    The gradient is 0 for log-probs that the loss does not use.
    """
    read = [inputs[key] for key in POLICY_LOGPS[get_loss(name).kind]]
    return torch.cat([(torch.zeros_like(x) if x.grad is None else x.grad).flatten() for x in read])


def with_gradients(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Set `requires_grad` for the policy's log-probs among the inputs, and return all inputs."""
    return {key: value.requires_grad_("policy" in key and "logps" in key) for key, value in inputs.items()}


@_check()
def check_gradients(name: str, **params: Any) -> None:
    """Check gradients with respect to the policy's log-probs against finite differences (gradcheck) in float64.

    For the finite differences, values that the loss detaches keep their values at the unchanged inputs.
    """
    inputs, held = made_up_inputs(), DetachedValues()
    policy = [key for key in get_loss(name).inputs if key.startswith("policy") and key.endswith("logps")]

    def losses(*values: Tensor) -> Tensor:
        with held.replayed():
            return call(name, {**inputs, **dict(zip(policy, values, strict=True))}, **params).losses

    assert torch.autograd.gradcheck(losses, [inputs[key].clone().requires_grad_() for key in policy])


class DetachedValues:
    """Records what `detach` returns while a loss is called once, and returns the same values in later calls."""

    def __init__(self):
        self._values: list[Tensor] | None = None

    @contextmanager
    def replayed(self):
        """Record the results of `detach` in the first context, and replay them in later ones. It is not thread-safe."""
        values, detach, known = [], torch.Tensor.detach, self._values

        def replay(tensor: Tensor) -> Tensor:
            values.append(detach(tensor).clone() if known is None else known[len(values)])
            return values[-1]

        torch.Tensor.detach = replay
        try:
            yield
        finally:
            torch.Tensor.detach, self._values = detach, values


@_check(lambda spec: spec.kind is not SCORED)
def check_preferred_direction(name: str, **params: Any) -> None:
    """Check that dL/ds ≤ 0 for preferred responses and dL/ds ≥ 0 for other responses.

    Here, L is the loss, and s a log-prob of the response under the policy. In a list, only the best and the worst
    response are checked. Skip this check for losses with a finite target, such as squared losses, because their
    gradient changes its sign at the target.
    """
    inputs = with_gradients(made_up_inputs(pairs=50))
    call(name, inputs, **params).losses.sum().backward()
    found = gradients(name, inputs)
    kind = get_loss(name).kind
    if kind in (PAIRS, TRIPLES):
        rejected = sum(inputs[key].numel() for key in POLICY_LOGPS[kind] if "rejected" in key)
        preferred, other = found[:-rejected], found[-rejected:]
    elif kind is UNPAIRED:
        preferred, other = found[inputs["labels"]], found[~inputs["labels"]]
    else:
        best, worst = (best_of(sign * inputs["list_ranks"], inputs["list_mask"]) for sign in (1, -1))
        found = found.view_as(inputs["list_ranks"])
        preferred, other = found[best & ~worst], found[worst & ~best]
    assert (preferred <= 0).all() and (other >= 0).all()


@_check()
def check_order_of_examples(name: str, **params: Any) -> None:
    """Check that permuting the examples permutes their losses."""
    inputs, order = made_up_inputs(), torch.tensor([3, 0, 4, 1, 2])
    permuted = call(name, {key: value[order] for key, value in inputs.items()}, **params).losses
    torch.testing.assert_close(permuted, call(name, inputs, **params).losses[order], rtol=1e-14, atol=0)


@_check(lambda spec: not spec.needs_global_batch)
def check_examples_apart(name: str, **params: Any) -> None:
    """Check that an example has the same loss alone and in a batch.

    Register losses that fail this check with `needs_global_batch=True`.
    """
    inputs = made_up_inputs()
    alone = [call(name, {k: v[i : i + 1] for k, v in inputs.items()}, **params).losses for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), call(name, inputs, **params).losses, rtol=1e-14, atol=0)


@_check()
def check_far_out(name: str, **params: Any) -> None:
    """Check that losses, rewards and gradients in fp32 are finite for sums of −3,000 nats and log-ratios of ±1,000."""
    inputs = made_up_inputs(torch.float32)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    far = {key: value - 3000 if "ref" in key else value for key, value in inputs.items()}
    for side, direction in (("chosen", sign), ("rejected", -sign)):
        far[f"policy_{side}_logps"] = (far[f"ref_{side}_logps"] + 1000 * direction).requires_grad_()
        shift = 1000 / far[f"{side}_lengths"] * direction
        moved = (far[f"ref_{side}_token_logps"] + shift[:, None]) * far[f"{side}_token_mask"]
        far[f"policy_{side}_token_logps"] = moved.requires_grad_()
    far["policy_gold_logps"] = (far["policy_gold_logps"] - 3000).requires_grad_()
    far["policy_logps"] = (far["ref_logps"] + 1000 * sign).requires_grad_()
    signs = sign[:, None] * torch.tensor([1.0, -1.0, 1.0, -1.0])
    far["policy_list_logps"] = (far["ref_list_logps"] + 1000 * signs).requires_grad_()
    output = call(name, far, **params)
    output.losses.sum().backward()
    assert output.losses.isfinite().all()
    assert output.rewards is None or output.rewards.isfinite().all()
    assert gradients(name, far).isfinite().all()


@_check()
def check_fp32(name: str, **params: Any) -> None:
    """Compare the losses in fp32 and float64 for long responses, of about 2,000 tokens and −3,000 nats.

    For such summed log-probs s, e^s underflows. The tolerance allows for the rounding of s in fp32, about 1e-4 nats.
    """
    inputs = made_up_inputs()
    for key in ("chosen_lengths", "rejected_lengths", "gold_lengths", "lengths", "list_lengths"):
        inputs[key] = inputs[key] + 2000
    for key in [key for key in inputs if key.endswith("logps")]:
        inputs[key] = inputs[key] - (100 if "token" in key else 3000)
    single = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    found, exact = (call(name, given, **params).losses.double() for given in (single, inputs))
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=2e-4)


@_check(lambda spec: bool({"chosen_lengths", "lengths", "list_lengths"} & {*spec.inputs}))
def check_empty_responses(name: str, **params: Any) -> None:
    """Check that losses and gradients are finite for empty responses, which have a length and a log-prob of 0."""
    inputs = made_up_inputs()
    empty = {
        key: torch.zeros_like(value) if "lengths" in key or "logps" in key else value for key, value in inputs.items()
    }
    empty = with_gradients(empty)
    losses = call(name, empty, **params).losses
    losses.sum().backward()
    assert losses.isfinite().all() and gradients(name, empty).isfinite().all()


@_check(lambda spec: spec.kind is LISTS)
def check_list_padding(name: str, **params: Any) -> None:
    """Check the padding of lists: it has no gradient, and neither its values nor its width change the losses."""
    inputs = with_gradients(made_up_inputs())
    losses = call(name, inputs, **params).losses
    losses.sum().backward()
    mask = inputs["list_mask"]
    found = inputs["policy_list_logps"].grad
    assert found is not None and (found[~mask] == 0).all()
    other = {key: x.detach() for key, x in inputs.items() if "list" in key}
    wild = {key: x if key == "list_mask" else x.masked_fill(~mask, 3) for key, x in other.items()}
    wider = {key: pad(x, (0, 1)) for key, x in other.items()}
    for same in (wild, wider):
        torch.testing.assert_close(call(name, same, **params).losses, losses.detach(), rtol=1e-14, atol=0)
    short = {key: x[:1, :2] for key, x in other.items()}
    torch.testing.assert_close(call(name, short, **params).losses, losses[:1].detach(), rtol=1e-14, atol=0)


@_check(lambda spec: spec.kind is LISTS)
def check_list_order(name: str, **params: Any) -> None:
    """Check that permuting a list's responses keeps the loss and permutes the rewards.

    Ranks and scores are permuted with the responses. Some lists have equally good responses. The check also runs with a
    policy that equals the reference.
    """
    inputs = {key: x for key, x in made_up_inputs().items() if "list" in key}
    order = torch.tensor([3, 1, 0, 2])
    for given in (inputs, {**inputs, "policy_list_logps": inputs["ref_list_logps"]}):
        output = call(name, given, **params)
        moved = call(name, {key: x[:, order] for key, x in given.items()}, **params)
        torch.testing.assert_close(moved.losses, output.losses, rtol=1e-13, atol=0)
        if output.rewards is not None:
            torch.testing.assert_close(moved.rewards, output.rewards[:, order], rtol=1e-14, atol=0)


@_check(lambda spec: spec.kind is LISTS and "list_ranks" in spec.inputs)
def check_list_ties(name: str, **params: Any) -> None:
    """Check that training decreases no response's log-prob if all responses are equally good (dL/ds ≤ 0)."""
    inputs = with_gradients({key: x for key, x in made_up_inputs().items() if "list" in key})
    call(name, {**inputs, "list_ranks": torch.ones_like(inputs["list_ranks"])}, **params).losses.sum().backward()
    found = inputs["policy_list_logps"].grad
    assert found is None or (found <= 0).all()


@_check(lambda spec: any("token" in name for name in spec.inputs))
def check_token_width(name: str, **params: Any) -> None:
    """Check that the width of the padding of tokens does not change the losses by more than rounding."""
    inputs = made_up_inputs()
    longest = int(max(inputs[f"{side}_lengths"].max() for side in ("chosen", "rejected")))
    for width in (longest, 3 * longest):
        resized = {key: pad(x, (0, width - x.shape[1])) if "token" in key else x for key, x in inputs.items()}
        found, expected = (call(name, given, **params).losses for given in (resized, inputs))
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


@_check()
def check_objective(name: str, **params: Any) -> None:
    """Check that an objective that has only this loss returns the same values as the loss itself."""
    inputs = made_up_inputs()
    objective = build_objective([name], loss_params=params)
    objective.update_state(inputs)
    known: dict[str, Any] = {"progress": objective.progress, "epoch": objective.epoch, "training": True}
    known["state"] = objective.state.get(name)
    run_inputs = {asked: known[asked] for asked in get_loss(name).run_inputs}
    expected = call(name, inputs, **params, **run_inputs).losses
    torch.testing.assert_close(objective(inputs).losses, expected, rtol=1e-14, atol=0)
