"""Losses of triples: a pair to contrast, and a third, gold response to imitate, without a reference model.

s is a response's summed log-prob (nats), s̄ the same per scored token, NLL(y) = −s̄; g is the gold response.
"""

from torch import Tensor

from hf_prefopt.losses.base import (
    LossOutput,
    check_positive,
    check_range,
    check_same_shape,
    logistic,
    mean_logps,
    pair_rewards,
    per_token,
)
from hf_prefopt.losses.registry import register_loss


@register_loss("tpo", paper="2405.16681")
def tpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    policy_gold_logps: Tensor,
    gold_lengths: Tensor,
    beta: float = 0.01,
    tpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """ℓ(β(s_w − s_l)) + α·NLL(y_g): contrast without a reference, held to a third, gold response.

    Triple preference optimization: CPO whose NLL is of a response that is better than both of the pair. Each example's
    NLL is by its own length, where TRL averages over the tokens of a micro-batch. The implicit reward is β·s.

    Use it where prompts have a response worth imitating beside two that are only compared: solutions by an expert, and
    pairs of the model's own.

    Args:
        policy_chosen_logps, policy_rejected_logps, policy_gold_logps: `[B]`, summed, nats. gold_lengths: `[B]`, tokens.
        beta: > 0. tpo_alpha: α ≥ 0. label_smoothing: ε in [0, 0.5), as in `dpo_loss`.

    Raises:
        ValueError: shapes differ or a value is out of range.
    """
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        policy_gold_logps=policy_gold_logps,
        gold_lengths=gold_lengths,
    )
    rewards = beta * policy_chosen_logps, beta * policy_rejected_logps
    return _held_to_gold(rewards, 0.0, policy_gold_logps, gold_lengths, beta, tpo_alpha, label_smoothing)


@register_loss("tpo_l", aliases=("tpo-l",), paper="2405.16681", is_average_loss=True)
def tpo_l_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    policy_gold_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    gold_lengths: Tensor,
    beta: float = 0.01,
    gamma: float = 0.5,
    tpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """ℓ(β(s̄_w − s̄_l) − γ) + α·NLL(y_g): TPO on log-probs per token, with a target margin γ.

    The length-controlled form of triple preference optimization: SimPO's contrast beside TPO's NLL. β and γ are those
    that TRL has for it; γ counts in reward units, after β. The implicit reward is β·s̄.

    Use it as TPO, where the responses grow longer under it.

    Args:
        policy_chosen_logps, policy_rejected_logps, policy_gold_logps: `[B]`, summed, nats.
        chosen_lengths, rejected_lengths, gold_lengths: `[B]`, tokens.
        beta: > 0. gamma: γ ≥ 0. tpo_alpha: α ≥ 0. label_smoothing: ε in [0, 0.5).

    Raises:
        ValueError: shapes differ or a value is out of range.
    """
    check_range("gamma", gamma, 0.0)
    chosen, rejected = mean_logps(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths)
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps, policy_gold_logps=policy_gold_logps, gold_lengths=gold_lengths
    )
    rewards = beta * chosen, beta * rejected
    return _held_to_gold(rewards, gamma, policy_gold_logps, gold_lengths, beta, tpo_alpha, label_smoothing)


@register_loss("sft_gold", is_average_loss=True, computes_reward_metrics=False)
def sft_gold_loss(policy_gold_logps: Tensor, gold_lengths: Tensor) -> LossOutput:
    """NLL(y_g) = −s̄_g: supervised fine-tuning on the gold responses, each by its own length.

    Use it as a part of a mixture, to hold any loss of pairs to a gold response as TPO does.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(policy_gold_logps=policy_gold_logps, gold_lengths=gold_lengths)
    return LossOutput(-per_token(policy_gold_logps, gold_lengths))


def _held_to_gold(
    rewards: tuple[Tensor, Tensor],
    gamma: float,
    gold_logps: Tensor,
    gold_lengths: Tensor,
    beta: float,
    tpo_alpha: float,
    label_smoothing: float,
) -> LossOutput:
    """ℓ of the margin of the rewards less γ, and α times the NLL of the gold response."""
    check_positive(beta=beta)
    check_range("tpo_alpha", tpo_alpha, 0.0)
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    chosen, rejected = rewards
    preference = logistic(chosen - rejected - gamma, label_smoothing)
    nll = -per_token(gold_logps, gold_lengths)
    return LossOutput(
        preference + tpo_alpha * nll,
        pair_rewards(chosen, rejected),
        {"preference": preference.detach(), "nll": nll.detach()},
    )
