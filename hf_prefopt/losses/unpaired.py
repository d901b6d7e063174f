"""Losses of single responses. APO-zero, NPO and the NLL take responses with labels, and QRPO responses with quantiles.

r is the log-ratio of policy to reference, summed over a response (nats). The label True means desirable.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prefopt.losses.base import (
    LossOutput,
    UnsuitableExamples,
    advise_on_labels,
    check_positive,
    check_range,
    check_same_shape,
    log1mexp,
    per_token,
)
from hf_prefopt.losses.registry import register_loss


@register_loss("apo_zero_unpaired", paper="2408.06266", check_data=advise_on_labels)
def apo_zero_unpaired_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """λ_D(1 − σ(βr)) if desirable, λ_U·σ(βr) if not: raises or lowers the likelihood relative to the reference.

    Anchored preference optimization, APO-zero (eq. 7). Desirable responses have the first of its two terms, and
    undesirable ones the second. This is also KTO with a baseline z of 0. r is a response's log-ratio of policy to
    reference, and σ is the logistic function. The implicit reward is βr.

    Use it if desirable responses are better than the model's own responses, and undesirable ones are worse. The loss
    needs no statistics of the batch.

    Args:
        policy_logps, ref_logps: `[B]`. Summed log-probs (nats). labels: `[B]` bool. True for desirable responses.
        beta: > 0. desirable_weight, undesirable_weight: λ_D, λ_U ≥ 0.

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_positive(beta=beta)
    check_range("desirable_weight", desirable_weight, 0.0)
    check_range("undesirable_weight", undesirable_weight, 0.0)
    check_same_shape(policy_logps=policy_logps, ref_logps=ref_logps, labels=labels)
    rewards = beta * (policy_logps - ref_logps)
    desirable, undesirable = desirable_weight * torch.sigmoid(-rewards), undesirable_weight * torch.sigmoid(rewards)
    return LossOutput(torch.where(labels, desirable, undesirable), rewards.detach()[:, None])


@register_loss("npo", paper="2404.05868")
def npo_loss(policy_logps: Tensor, ref_logps: Tensor, labels: Tensor, beta: float = 0.1) -> LossOutput:
    """(2/β)·softplus(βr) on the forget set (undesirable responses), 0 on the retain set (desirable responses).

    Negative preference optimization. r is a response's log-ratio of policy to reference. The loss is DPO's loss without
    the chosen response. For β → 0, training becomes gradient ascent on the NLL of the forget set. `sft_weight` adds the
    NLL of the retain set, which has the responses that the model must keep. The implicit reward is βr.

    Use it for unlearning: label the forget set False and the retain set True, and set `sft_weight`.

    Args:
        policy_logps, ref_logps: `[B]`. Summed log-probs (nats). labels: `[B]` bool. False for the forget set.
        beta: > 0.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    check_positive(beta=beta)
    check_same_shape(policy_logps=policy_logps, ref_logps=ref_logps, labels=labels)
    rewards = beta * (policy_logps - ref_logps)
    return LossOutput(2 / beta * F.softplus(rewards) * ~labels, rewards.detach()[:, None])


def _check_quantiles(quantiles: Tensor) -> None:
    """Check that all quantiles are in [0, 1]."""
    wrong = ~((quantiles >= 0) & (quantiles <= 1))
    if wrong.any():
        raise UnsuitableExamples(
            wrong, f"its quantile is {quantiles[wrong][0].item():g}: give every row a number from 0 to 1"
        )


@register_loss("qrpo", paper="2507.08068", check_data=_check_quantiles)
def qrpo_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    lengths: Tensor,
    quantiles: Tensor,
    beta: float = 0.003,
    length_normalize: bool = False,
) -> LossOutput:
    """(Q − β log Z − βr)², Z = β(e^(1/β) − 1): the target of each reward is its value under the optimal policy.

    Quantile Reward Policy Optimization, with Z from eq. 11. r is a response's log-ratio of policy to reference. Q is
    the share of the reference's own responses to the prompt whose reward is at most that of this response. Under the
    reference, Q is distributed uniformly, so the normalizer Z is known. The authors' code uses the approximation
    βe^(1/β) for Z. The exact Z used here changes the target by at least 1e-3 if β ≥ 0.2. The implicit reward is βr.

    With `length_normalize=True`, β/|y| replaces β everywhere, including Z, where |y| is the number of scored tokens.
    The authors did this for Apertus, with β from 1 to 10.

    Use it if responses have rewards from a reward model or a verifier, and no preferences.

    Args:
        policy_logps, ref_logps: `[B]`. Summed log-probs (nats). lengths: `[B]`. Numbers of scored tokens.
        quantiles: `[B]`. Q in [0, 1].
        beta: > 0; the authors tried 3e-4 to 3e-3.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    check_positive(beta=beta)
    check_same_shape(policy_logps=policy_logps, ref_logps=ref_logps, lengths=lengths, quantiles=quantiles)
    ratios = policy_logps - ref_logps
    betas = torch.full_like(ratios, beta)
    if length_normalize:
        betas = per_token(betas, lengths)
    # `partition` is β log Z, computed without e^(1/β), which would overflow.
    partition = betas * (betas.log() + log1mexp(-1 / betas)) + 1
    rewards = betas * ratios
    return LossOutput((quantiles - partition - rewards).square(), rewards.detach()[:, None])


@register_loss("sft_unpaired", form_of="sft", is_average_loss=True, computes_reward_metrics=False)
def sft_unpaired_loss(policy_logps: Tensor, lengths: Tensor, labels: Tensor) -> LossOutput:
    """NLL(y) = −s̄ for a desirable response, 0 for an undesirable one: `sft` on unpaired examples.

    s̄ is a response's summed log-prob divided by its number of scored tokens.

    Use it through the name `sft`: the trainer selects this form if the dataset has labels.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(policy_logps=policy_logps, lengths=lengths, labels=labels)
    return LossOutput(-per_token(policy_logps, lengths) * labels)
