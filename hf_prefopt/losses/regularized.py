"""Losses that modify the margin inside DPO's ℓ. Each of them addresses one failure of DPO.

r = s − s_ref is the log-ratio of policy to reference, summed over a response (nats); h = r_w − r_l; ℓ(z) = −log σ(z).
"""

import torch
from torch import Tensor

from hf_prefopt.losses.base import (
    LossOutput,
    check_positive,
    check_range,
    exp_to_tangent,
    logistic,
    of_log_ratios,
    pair_rewards,
)
from hf_prefopt.losses.registry import register_loss


@register_loss("dpop", aliases=("dpo_positive",), paper="2402.13228")
@of_log_ratios()
def dpop_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.3, lambda_coef: float = 50.0) -> LossOutput:
    """ℓ(β(h − λ·max(0, −r_w))): penalizes chosen responses that become less likely than under the reference.

    DPO-positive (Smaug), eq. 3. r_w and r_l are the log-ratios log(π/π_ref) of the chosen and the rejected response,
    h = r_w − r_l, and ℓ(z) = −log σ(z). λ = 0 gives DPO. The implicit reward is βr, without the penalty.

    Use it if chosen and rejected responses differ in few tokens. DPO then lowers the likelihoods of both.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs
            (nats).
        beta: > 0.
        lambda_coef: λ ≥ 0.

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_range("lambda_coef", lambda_coef, 0.0)
    penalty = lambda_coef * (-chosen).relu()
    return LossOutput(
        logistic(beta * (chosen - rejected - penalty)),
        pair_rewards(beta * chosen, beta * rejected),
        {"penalty": (beta * penalty).detach()},
    )


@register_loss("r_dpo", paper="2403.19159")
@of_log_ratios(reference_free=True)
def r_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 0.1,
    alpha: float = 0.05,
) -> LossOutput:
    """ℓ(βh + α(|y_w| − |y_l|)): pairs whose preference agrees with the length difference have smaller gradients.

    Length-regularized DPO (R-DPO). r is a response's log-ratio of policy to reference, h = r_w − r_l, |y| is the number
    of scored tokens of a response y, and ℓ(z) = −log σ(z). The policy maximizes the regularized reward R − α|y|, where
    R is the true reward. For the optimal policy, R = βr + α|y| up to a constant for each prompt. The implicit reward is
    therefore βr + α|y|, and the loss adds the length difference with a positive sign. α = 0 gives DPO.

    Use it if chosen responses are longer than rejected ones and the model mostly learns to write longer responses.

    Args:
        chosen_lengths, rejected_lengths: `[B]`. Numbers of scored tokens. alpha: α ≥ 0, reward per token.

    Raises:
        ValueError: as in `dpop_loss`, or only one of the reference log-probs is given.
    """
    check_range("alpha", alpha, 0.0)
    # Convert the lengths first: an int64 tensor times a Python float has torch's default dtype, not that of the
    # log-probs.
    chosen = beta * chosen + alpha * chosen_lengths.to(chosen)
    rejected = beta * rejected + alpha * rejected_lengths.to(rejected)
    return LossOutput(logistic(chosen - rejected), pair_rewards(chosen, rejected))


@register_loss("dpo_shift", paper="2502.07599")
@of_log_ratios()
def dpo_shift_loss(
    chosen: Tensor,
    rejected: Tensor,
    beta: float = 0.1,
    lambda_coef: float = 0.7,
    lambda_end: float | None = None,
    progress: float = 1.0,
) -> LossOutput:
    """ℓ(β(r_w − λr_l)): the rejected reward counts less, so that the chosen likelihood falls less.

    DPO-Shift. r_w and r_l are the log-ratios log(π/π_ref) of the chosen and the rejected response, and
    ℓ(z) = −log σ(z). λ = 1 gives DPO.

    λ is constant, or changes linearly from λ_0 (`lambda_coef`) to λ_end (`lambda_end`). After k of the run's n
    optimizer steps, it is λ_0 + (λ_end − λ_0)k/n, in training and in evaluation. The authors' code has the same
    schedule, with λ_0 = 0.5 and λ_end = 1. The implicit reward is βr, without λ.

    Use it if DPO lowers the likelihood of the chosen responses.

    Args:
        lambda_coef: λ in [0, 1], or its initial value λ_0.
        lambda_end: the final value λ_end in [0, 1], or `None` for a constant λ.
        progress: k/n, in [0, 1]. The trainer provides it. The default, 1, is the end of a run.

    Raises:
        ValueError: as in `dpop_loss`.
    """
    check_range("lambda_coef", lambda_coef, 0.0, 1.0, closed_high=True)
    check_range("progress", progress, 0.0, 1.0, closed_high=True)
    components = {}
    if lambda_end is not None:
        check_range("lambda_end", lambda_end, 0.0, 1.0, closed_high=True)
        lambda_coef += (lambda_end - lambda_coef) * progress
        components["lambda"] = torch.full_like(chosen, lambda_coef)
    losses = logistic(beta * (chosen - lambda_coef * rejected))
    return LossOutput(losses, pair_rewards(beta * chosen, beta * rejected), components)


@register_loss("chi_po", aliases=("chipo",), paper="2407.13399", has_own_divergence=True)
@of_log_ratios()
def chi_po_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1, reward_bound: float | None = None) -> LossOutput:
    """ℓ(clip(β(φ(r_w) − φ(r_l)), ±2R)), φ(r) = r + e^r: DPO regularized by the χ² divergence in addition to the KL.

    χ²-preference optimization, algorithm 1. r is a response's log-ratio of policy to reference, and ℓ(z) = −log σ(z).
    The paper's link function is z + log z, which is φ(r) at z = π/π_ref = e^r. It is the derivative of
    ½(z−1)² + z log z. At the optimum of E[reward] − β(χ² + KL), the reward is therefore βφ(r) plus a constant for each
    prompt, so βφ(r) is the implicit reward.

    The algorithm clips at a bound R of the true reward, which a dataset does not provide. Without `reward_bound`,
    nothing is clipped. The paper gives no default for β. For r > 20, e^r is replaced by its tangent.

    Use it if DPO overfits the pairs (overoptimization): the χ² term grows with the distance from the reference.

    Args:
        reward_bound: R > 0, in reward units. A pair whose margin is beyond ±2R has no gradient.

    Raises:
        ValueError: as in `dpop_loss`.
    """
    chosen, rejected = (beta * (ratio + exp_to_tangent(ratio)) for ratio in (chosen, rejected))
    margin = chosen - rejected
    if reward_bound is not None:
        check_positive(reward_bound=reward_bound)
        margin = margin.clamp(-2 * reward_bound, 2 * reward_bound)
    return LossOutput(logistic(margin), pair_rewards(chosen, rejected))
