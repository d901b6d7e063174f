"""SimPO and its variants: losses of the mean log-prob per token of each response, without a reference.

s̄ is a response's summed log-prob (nats) divided by its number of scored tokens. e^s̄ is the inverse of its perplexity.
"""

import torch
from torch import Tensor

from hf_prefopt.losses.base import (
    LossOutput,
    check_positive,
    check_range,
    check_same_shape,
    expm1_to_tangent,
    less_margins,
    logistic,
    mean_logps,
    pair_rewards,
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
    margins: Tensor | None = None,
) -> LossOutput:
    """ℓ(β(s̄_w − s̄_l) − γ): the reward is β times the mean log-prob, and γ is the target margin.

    Simple preference optimization, eq. 6. s̄_w and s̄_l are the mean log-probs per scored token of the chosen and the
    rejected response, and ℓ(z) = −log σ(z). Set the margin either as γ or as γ/β (default 0.5).

    Use it if a reference model does not fit into memory, and length must not be rewarded. Tune β and γ together.

    Args:
        policy_chosen_logps, policy_rejected_logps: `[B]`. Summed log-probs (nats).
        chosen_lengths, rejected_lengths: `[B]`. Numbers of scored tokens.
        beta: > 0.
        gamma: ≥ 0, in reward units.
        gamma_beta_ratio: ≥ 0, nats per token.
        label_smoothing: ε in [0, 0.5), the probability that a label is flipped.
        margins: `[B]`. A target margin for each pair, in reward units, which is subtracted in addition to γ.

    Raises:
        ValueError: both gamma and gamma_beta_ratio are given, shapes differ, or a value is out of range.
    """
    check_positive(beta=beta)
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    gamma = target_margin(beta, gamma, gamma_beta_ratio)
    chosen, rejected = mean_logps(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths)
    if margins is not None:
        check_same_shape(policy_chosen_logps=policy_chosen_logps, margins=margins)
    excess = less_margins(beta * (chosen - rejected) - gamma, margins)
    return LossOutput(logistic(excess, label_smoothing), pair_rewards(beta * chosen, beta * rejected))


def target_margin(
    beta: float, gamma: float | None, gamma_beta_ratio: float | None, default_ratio: float = 0.5
) -> float:
    """Return the target margin γ, which the caller gives as γ or as γ/β. If neither is given, it is `default_ratio`·β.

    Raises:
        ValueError: both are given, or the value is negative.
    """
    if gamma is not None and gamma_beta_ratio is not None:
        raise ValueError(f"gamma={gamma} and gamma_beta_ratio={gamma_beta_ratio} both set the margin: pass one of them")
    if gamma is None:
        ratio = default_ratio if gamma_beta_ratio is None else gamma_beta_ratio
        check_range("gamma_beta_ratio", ratio, 0.0)
        return ratio * beta
    check_range("gamma", gamma, 0.0)
    return gamma


@register_loss("alphapo", aliases=("alpha_po",), paper="2501.03884", is_average_loss=True)
def alphapo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.5,
    alpha: float = 0.25,
    gamma: float | None = None,
    gamma_beta_ratio: float | None = None,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """ℓ(β(ρ_w − ρ_l) − γ), ρ = (1 − e^(−α s̄))/α: SimPO with a reward whose shape depends on α.

    AlphaPO. s̄ is a response's mean log-prob per scored token, and ℓ(z) = −log σ(z). At α = 0, the loss uses the limit
    ρ = s̄, which gives SimPO. Set the margin either as γ or as γ/β. The default of γ/β is 0.04, so γ = 0.1 at β = 2.5.
    ρ is computed from s̄ without a probability, which could underflow. If the exponent x = −α·s̄ is above 20, which no
    trained model reaches, e^x is replaced by its tangent. The implicit reward is β·ρ.

    Use it if SimPO lowers the likelihood of both responses too much or too little. α controls this.

    Args:
        alpha: any finite number. beta, gamma, gamma_beta_ratio, label_smoothing: as in `simpo_loss`.

    Raises:
        ValueError: as in `simpo_loss`, or alpha is not finite.
    """
    check_positive(beta=beta)
    check_range("alpha", alpha, float("-inf"), open_low=True)
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    gamma = target_margin(beta, gamma, gamma_beta_ratio, default_ratio=0.04)
    chosen, rejected = (
        mean if alpha == 0 else expm1_to_tangent(-alpha * mean) / -alpha
        for mean in mean_logps(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths)
    )
    return LossOutput(
        logistic(beta * (chosen - rejected) - gamma, label_smoothing), pair_rewards(beta * chosen, beta * rejected)
    )


@register_loss("simper", paper="2502.00883", is_average_loss=True)
def simper_loss(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> LossOutput:
    """e^s̄_l − e^s̄_w: the difference of the inverse perplexities, without hyperparameters.

    SimPER. s̄_w and s̄_l are the mean log-probs per scored token of the chosen and the rejected response. The implicit
    reward is e^s̄, in (0, 1].

    Use it if you do not want to tune any hyperparameter of the loss.

    Raises:
        ValueError: shapes differ.
    """
    chosen, rejected = mean_logps(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths)
    return LossOutput(rejected.exp() - chosen.exp(), pair_rewards(chosen.exp(), rejected.exp()))


@register_loss("repo", paper="2503.07426", is_average_loss=True)
def repo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    gamma: float = 0.5,
) -> LossOutput:
    """max(0, γ − (s̄_w − s̄_l)): SimPO's limit for large β; a pair beyond the margin has no gradient.

    ReLU-based preference optimization (RePO). s̄_w and s̄_l are the mean log-probs per scored token of the chosen and
    the rejected response. The implicit reward is s̄.

    Use it in place of SimPO if you want to tune one hyperparameter less.

    Args:
        gamma: γ ≥ 0, nats per token.

    Raises:
        ValueError: shapes differ or gamma is out of range.
    """
    check_range("gamma", gamma, 0.0)
    chosen, rejected = mean_logps(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths)
    return LossOutput(torch.relu(gamma - (chosen - rejected)), pair_rewards(chosen, rejected))
