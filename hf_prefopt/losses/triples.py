"""Losses of triples, without a reference model. A triple is a pair to contrast, and a third, gold response to imitate.

s is a response's summed log-prob (nats), s̄ is s divided by its number of scored tokens, and its NLL is −s̄. w, l and g
are the chosen, the rejected and the gold response.
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
    """ℓ(β(s_w − s_l)) + α·NLL(y_g): a contrastive loss without a reference, plus the NLL of a third, gold response.

    Triple preference optimization: CPO with the NLL of a response y_g that is better than both responses of the pair.
    s_w and s_l are the summed log-probs of the chosen and the rejected response, and ℓ(z) = −log σ(z). The NLL of a
    gold response is divided by its number of scored tokens. In TRL, it is the mean over all gold tokens of a
    micro-batch. The implicit reward is β·s.

    Use it if each prompt has a response to imitate and two others to compare, such as an expert's solution and a pair
    of the model's own responses.

    Args:
        policy_chosen_logps, policy_rejected_logps, policy_gold_logps: `[B]`. Summed log-probs (nats).
        gold_lengths: `[B]`. Numbers of scored tokens.
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

    The length-controlled form of triple preference optimization: SimPO's contrastive loss plus TPO's NLL. s̄ is a
    response's mean log-prob per scored token, y_g is the gold response, its NLL is −s̄_g, and ℓ(z) = −log σ(z). The
    defaults of β and γ are TRL's. γ is in reward units, so it is not multiplied by β. The implicit reward is β·s̄.

    Use it instead of TPO if TPO makes responses longer.

    Args:
        policy_chosen_logps, policy_rejected_logps, policy_gold_logps: `[B]`. Summed log-probs (nats).
        chosen_lengths, rejected_lengths, gold_lengths: `[B]`. Numbers of scored tokens.
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
    """NLL(y_g) = −s̄_g: supervised fine-tuning on the gold responses; each NLL is divided by the response's length.

    s̄_g is the gold response's summed log-prob divided by its number of scored tokens.

    Use it in a mixture with any loss of pairs, to add the NLL of the gold response, as TPO does.

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
    """Return ℓ(z) + α·NLL(y_g), where z is the reward margin minus γ, α is `tpo_alpha`, and y_g is the gold response.

    Args:
        rewards: the rewards of the chosen and of the rejected responses, each `[B]`.
    """
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
