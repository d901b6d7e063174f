"""Pair losses that compare the pairs of the global batch: AOT sorts their margins, Dr. DPO takes a soft minimum.

Each loss is computed from the whole global batch (`needs_global_batch`), so the split into micro-batches and ranks does
not matter. The mean of the returned losses over the batch is the loss as the paper defines it.
"""

import math

import torch
from torch import Tensor

from hf_prefopt.losses.base import (
    LossOutput,
    check_positive,
    check_range,
    log_ratios,
    logistic,
    of_log_ratios,
    pair_rewards,
)
from hf_prefopt.losses.registry import register_loss


def _at_rank_of(values: Tensor, others: Tensor) -> Tensor:
    """Reorder `others`, `[B]`: its k-th smallest entry moves to the position of the k-th smallest entry of `values`.

    The paper sorts both vectors, which compares the same numbers with each other. Reordering only `others` keeps each
    loss at the position of its example.
    """
    ranks = values.argsort(stable=True).argsort()
    return others.sort().values[ranks]


@register_loss("aot", aliases=("aot_pair",), paper="2406.05882", needs_global_batch=True)
def aot_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """ℓ(β·Δ), Δ = sort_B(s_w − s_l) − sort_B(ref_w − ref_l): makes the policy's margins dominate the reference's.

    Alignment via optimal transport, paired. s and ref are a response's summed log-probs under policy and reference,
    sort_B sorts over the batch, and ℓ(z) = −log σ(z). The loss compares each quantile of the policy's margins s_w − s_l
    in the batch with the same quantile of the reference's margins. A pair gets the Δ at the rank of its own policy
    margin. The implicit reward is β(s − ref). Earlier versions of TRL call this loss `aot_pair` and the unpaired form
    `aot`.

    Use it on noisy pairs, in batches of several tens of pairs: it improves the distribution of margins, not each pair.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs
            (nats) of the B pairs in the global batch.
        beta: > 0. label_smoothing: ε in [0, 0.5), as in `dpo_loss`.

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_positive(beta=beta)
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    chosen, rejected = log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps)
    policy_margins, ref_margins = policy_chosen_logps - policy_rejected_logps, ref_chosen_logps - ref_rejected_logps
    excess = policy_margins - _at_rank_of(policy_margins, ref_margins)
    return LossOutput(logistic(beta * excess, label_smoothing), pair_rewards(beta * chosen, beta * rejected))


@register_loss("aot_unpaired", paper="2406.05882", needs_global_batch=True)
@of_log_ratios()
def aot_unpaired_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.01, label_smoothing: float = 0.0) -> Tensor:
    """ℓ(β·Δ), Δ = sort_B(r_w) − sort_B(r_l): makes the rewards of chosen responses dominate those of rejected ones.

    Alignment via optimal transport, unpaired: it does not matter which rejected response is paired with which chosen
    one. r is a response's log-ratio of policy to reference, sort_B sorts over the batch, and ℓ(z) = −log σ(z). The loss
    of a pair compares its chosen response with the rejected response whose r has the same rank in the batch. The
    arguments are those of `aot_loss`.

    Use it if chosen and rejected responses were collected separately. The batches should have several tens of pairs.

    Raises:
        ValueError: as in `aot_loss`.
    """
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    excess = chosen - _at_rank_of(chosen, rejected)
    return logistic(beta * excess, label_smoothing)


@register_loss("dr_dpo", aliases=("drdpo",), paper="2407.07880", needs_global_batch=True, is_one_value=True)
@of_log_ratios(reference_free=True)
def dr_dpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1, beta_prime: float = 1.0) -> LossOutput:
    """−β′ log mean_B e^(−ℓ(βh)/β′): pairs with a large loss, which may be mislabeled, count less.

    Distributionally robustifying DPO (Dr. DPO). r_w and r_l are the log-ratios log(π/π_ref) of the chosen and the
    rejected response, h = r_w − r_l, and ℓ(z) = −log σ(z). The loss is one value for the whole batch. Every pair gets
    this value, so the mean over the pairs equals it. In the gradient, pair i with the DPO loss ℓ_i = ℓ(βh_i) has the
    weight softmax(−ℓ/β′)_i over the batch. The component `preference` is ℓ(βh) of each pair. β′ → ∞ gives DPO.

    Use it if a substantial share of the pairs may have chosen and rejected swapped.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs
            (nats) of the B pairs in the global batch.
        beta: > 0. beta_prime: β′ > 0, in the unit of the loss (nats).

    Raises:
        ValueError: shapes differ, only one of the reference log-probs is given, or a hyperparameter is out of range.
    """
    check_positive(beta_prime=beta_prime)
    preference = logistic(beta * (chosen - rejected))
    value = -beta_prime * (torch.logsumexp(-preference / beta_prime, dim=0) - math.log(len(preference)))
    return LossOutput(
        value.expand_as(preference),
        pair_rewards(beta * chosen, beta * rejected),
        {"preference": preference.detach()},
    )
