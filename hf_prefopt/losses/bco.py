"""Binary classifier optimization (BCO): losses that compare rewards βr with their running mean δ over all batches.

r is the log-ratio of policy to reference, summed over a response (nats).
"""

import torch
from torch import Tensor

from hf_prefopt.losses.base import (
    LossOutput,
    advise_on_labels,
    check_positive,
    check_same_shape,
    logistic,
    of_log_ratios,
    pair_rewards,
)
from hf_prefopt.losses.registry import RunningState, register_loss

_START = {"delta": 0.0, "count": 0.0}


def _mean_with(state: dict[str, Tensor], rewards: Tensor) -> dict[str, Tensor]:
    """Return the new state: the mean and the number of all rewards so far, including the new `rewards`."""
    count = state["count"] + rewards.numel()
    return {"delta": state["delta"] + (rewards.mean() - state["delta"]) * rewards.numel() / count, "count": count}


def _update_unpaired(state: dict[str, Tensor], policy_logps: Tensor, ref_logps: Tensor, beta: float = 0.01, **_):
    return _mean_with(state, beta * (policy_logps - ref_logps))


def _update_pairs(
    state: dict[str, Tensor],
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float = 0.01,
):
    ratios = (policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps)
    return _mean_with(state, beta * torch.cat(ratios))


@register_loss(
    "bco",
    paper="2404.04656",
    needs_global_batch=True,
    check_data=advise_on_labels,
    state=RunningState(_START, _update_unpaired),
)
def bco_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    beta: float = 0.01,
    state: dict[str, Tensor] | None = None,
) -> LossOutput:
    """ℓ(βr − δ) if desirable, ℓ(δ − βr) if not; δ is the running mean of βr over all training examples so far.

    Binary classifier optimization. r is a response's log-ratio of policy to reference, and ℓ(z) = −log σ(z). Each step
    updates δ with its global batch before the loss is computed; evaluation does not change δ. As in TRL's last BCO
    trainer, δ is the plain mean of all rewards, not an exponential moving average. The implicit reward is βr.

    If desirable and undesirable examples have different prompts, the paper weights the undesirable examples by the
    similarity of their prompts to the prompts of the desirable examples (underlying distribution matching). Before
    training, `distribution_matching_weights` in `data.bco_weights` computes such weights from prompt embeddings, for
    the column `weight`.

    Use it on thumbs-up / thumbs-down data, as an alternative to KTO that needs no forward pass over mismatched pairs.

    Args:
        policy_logps, ref_logps: `[B]`. Summed log-probs (nats). labels: `[B]` bool. True for desirable examples.
        beta: > 0.
        state: holds δ as `delta`. If it is `None`, δ is the mean reward of this batch.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    check_positive(beta=beta)
    check_same_shape(policy_logps=policy_logps, ref_logps=ref_logps, labels=labels)
    rewards = beta * (policy_logps - ref_logps)
    delta = rewards.mean().detach() if state is None else state["delta"]
    margins = torch.where(labels, rewards - delta, delta - rewards)
    return LossOutput(logistic(margins), rewards.detach()[:, None], {"delta": delta.expand_as(rewards)})


@register_loss("bco_pair", paper="2404.04656", needs_global_batch=True, state=RunningState(_START, _update_pairs))
@of_log_ratios()
def bco_pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    beta: float = 0.01,
    state: dict[str, Tensor] | None = None,
) -> LossOutput:
    """ℓ(βr_w − δ) + ℓ(δ − βr_l); δ is the running mean of both rewards over all training pairs so far.

    Binary classifier optimization on pairs. r_w and r_l are the log-ratios log(π/π_ref) of the chosen and the rejected
    response, and ℓ(z) = −log σ(z). δ is computed as in `bco_loss`, from the rewards βr of both responses of every pair.
    TRL's former `bco_pair` took the mean of the batch means, which is the same if all batches have the same size.

    Use it in a mixture of losses, to judge each response on its own. MPO, for example, uses
    0.8 dpo + 0.2 bco_pair + 1 sft.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs
            (nats).
        beta: > 0.
        state: holds δ as `delta`. If it is `None`, δ is the mean reward of this batch.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    rewards = pair_rewards(beta * chosen, beta * rejected)
    delta = rewards.mean() if state is None else state["delta"]
    losses = logistic(beta * chosen - delta) + logistic(delta - beta * rejected)
    return LossOutput(losses, rewards, {"delta": delta.expand_as(losses)})
