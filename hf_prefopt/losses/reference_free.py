"""Losses that need no reference: SimPO, CPO, ORPO and plain supervised fine-tuning.

s is a response's summed log-prob (nats), s̄ the same per scored token, NLL(y) = −s̄.
"""

from torch import Tensor

from hf_prefopt.losses.base import (
    LossOutput,
    check_positive,
    check_range,
    check_same_shape,
    log1mexp,
    logistic,
    pair_rewards,
    per_token,
)
from hf_prefopt.losses.registry import register_loss


@register_loss("simpo", paper="2405.14734", is_average_loss=True)
def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.0,
    gamma: float | None = None,
    gamma_beta_ratio: float | None = None,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """ℓ(β(s̄_w − s̄_l) − γ): the mean log-prob of a response is its reward, γ the target margin.

    Simple preference optimisation, eq. 6. The margin is given once: as γ itself, or as γ/β (the default, 0.5).

    Args:
        policy_chosen_logps, policy_rejected_logps: `[B]`, summed, nats; lengths: `[B]`, tokens.
        beta: > 0. gamma: ≥ 0, in reward units. gamma_beta_ratio: ≥ 0, nats per token.

    Raises:
        ValueError: both gamma and gamma_beta_ratio are given, shapes differ, or a value is out of range.
    """
    check_positive(beta=beta)
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    gamma = target_margin(beta, gamma, gamma_beta_ratio)
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    chosen = beta * per_token(policy_chosen_logps, chosen_lengths)
    rejected = beta * per_token(policy_rejected_logps, rejected_lengths)
    return LossOutput(logistic(chosen - rejected - gamma, label_smoothing), pair_rewards(chosen, rejected))


def target_margin(
    beta: float, gamma: float | None, gamma_beta_ratio: float | None, default_ratio: float = 0.5
) -> float:
    """γ, from γ itself or from γ/β, whichever is given; neither means `default_ratio`·β.

    Raises:
        ValueError: both are given, or the one given is negative.
    """
    if gamma is not None and gamma_beta_ratio is not None:
        raise ValueError(f"gamma={gamma} and gamma_beta_ratio={gamma_beta_ratio} both set the margin: pass one of them")
    if gamma is None:
        ratio = default_ratio if gamma_beta_ratio is None else gamma_beta_ratio
        check_range("gamma_beta_ratio", ratio, 0.0)
        return ratio * beta
    check_range("gamma", gamma, 0.0)
    return gamma


@register_loss("cpo", paper="2401.08417")
def cpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """ℓ(β(s_w − s_l)) + α·NLL(y_w): contrast without a reference, held to the chosen responses.

    Contrastive preference optimisation, eq. 5. Its hinge, IPO and SimPO forms are those losses with
    `reference_free` where they have a reference, and `sft_weight` for α.

    Raises:
        ValueError: shapes differ or a value is out of range.
    """
    check_positive(beta=beta)
    check_range("cpo_alpha", cpo_alpha, 0.0)
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        chosen_lengths=chosen_lengths,
    )
    preference = logistic(beta * (policy_chosen_logps - policy_rejected_logps), label_smoothing)
    nll = -per_token(policy_chosen_logps, chosen_lengths)
    return LossOutput(
        preference + cpo_alpha * nll,
        pair_rewards(beta * policy_chosen_logps, beta * policy_rejected_logps),
        {"preference": preference.detach(), "nll": nll.detach()},
    )


@register_loss("orpo", paper="2403.07691", is_average_loss=True)
def orpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 0.1,
) -> LossOutput:
    """NLL(y_w) + β·ℓ(log-odds_w − log-odds_l), log-odds = s̄ − log(1 − e^s̄).

    Odds-ratio preference optimisation, eq. 6 and 7; β is the paper's λ. The odds are of the geometric mean
    probability of a token; log(1 − e^s̄) is computed so that a likely response costs no precision.
    The implicit reward is β·s̄.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    check_positive(beta=beta)
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    chosen = per_token(policy_chosen_logps, chosen_lengths)
    rejected = per_token(policy_rejected_logps, rejected_lengths)
    log_odds_ratio = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    preference = logistic(log_odds_ratio)
    return LossOutput(
        beta * preference - chosen,
        pair_rewards(beta * chosen, beta * rejected),
        {"preference": preference.detach(), "nll": -chosen.detach(), "log_odds_ratio": log_odds_ratio.detach()},
    )


@register_loss("sft", is_average_loss=True, computes_reward_metrics=False)
def sft_loss(policy_chosen_logps: Tensor, chosen_lengths: Tensor) -> LossOutput:
    """NLL(y_w) = −s̄_w: supervised fine-tuning on the chosen responses, each by its own length.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(policy_chosen_logps=policy_chosen_logps, chosen_lengths=chosen_lengths)
    return LossOutput(-per_token(policy_chosen_logps, chosen_lengths))
