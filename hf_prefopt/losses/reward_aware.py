"""Pair losses that use how much better the chosen response is: ODPO, reward-aware RPO, and SPPO with win rates.

r is the log-ratio of policy to reference, summed over a response (nats), and h = r_w − r_l. R is a response's score
from the dataset, which is larger for better responses, and ΔR = R_w − R_l. Every implicit reward here is βr.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prefopt.losses.base import (
    LossOutput,
    UnsuitableExamples,
    check_positive,
    check_range,
    logistic,
    of_log_ratios,
    pair_rewards,
)
from hf_prefopt.losses.registry import register_loss

MARGINS = ("difference", "ratio")


def _check_order(chosen_scores: Tensor, rejected_scores: Tensor, margin: str) -> None:
    """Check that the chosen response has the larger score, and that both are above 0 if the margin is their ratio."""
    wrong = ~(chosen_scores > rejected_scores)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise UnsuitableExamples(
            wrong,
            f"its chosen_score {chosen_scores[at].item():g} is not above its rejected_score "
            f"{rejected_scores[at].item():g}, so its margin is undefined: drop the row, or swap its responses",
        )
    wrong = ~(rejected_scores > 0)
    if margin == "ratio" and wrong.any():
        raise UnsuitableExamples(
            wrong,
            f"its rejected_score {rejected_scores[wrong][0].item():g} is not above 0, which margin='ratio' requires: "
            "use positive scores, or margin='difference'",
        )


@register_loss("odpo", paper="2402.10571", check_data=_check_order)
@of_log_ratios()
def odpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    beta: float = 0.1,
    alpha: float = 1.0,
    margin: str = "difference",
) -> LossOutput:
    """ℓ(βh − α log ΔR): DPO with a margin that grows with how much better the chosen response is.

    DPO with an offset (ODPO). r_w and r_l are the log-ratios log(π/π_ref) of the chosen and the rejected response, and
    h = r_w − r_l. ΔR = R_w − R_l is the difference between their scores, and ℓ(z) = −log σ(z). With `margin="ratio"`,
    the offset is α log(R_w/R_l). α = 0 gives DPO.

    Use it on pairs that a reward model or raters have scored on one scale, if some score differences are much larger
    than others.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs
            (nats).
        chosen_scores, rejected_scores: `[B]`. Scores R_w and R_l, with R_w > R_l. `margin="ratio"` also requires
            R_l > 0. The trainer rejects rows with other scores.
        beta: > 0. alpha: ≥ 0, in reward units. margin: "difference" or "ratio".

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_range("alpha", alpha, 0.0)
    if margin not in MARGINS:
        raise ValueError(f"margin={margin!r} is not one of {', '.join(MARGINS)}")
    excess = chosen_scores - rejected_scores if margin == "difference" else chosen_scores / rejected_scores
    offsets = alpha * excess.log() if alpha > 0 else torch.zeros_like(excess)
    losses = logistic(beta * (chosen - rejected) - offsets)
    return LossOutput(losses, pair_rewards(beta * chosen, beta * rejected), {"margin": offsets})


def _bernoulli_kl(first: Tensor, second: Tensor) -> Tensor:
    """Return the KL divergence (nats) of two Bernoulli distributions, KL(σ(a) ‖ σ(b)), from their logits a and b.

    log σ is computed from the logits, so no rounding of σ affects the logarithm.
    """
    yes = torch.sigmoid(first) * (F.logsigmoid(first) - F.logsigmoid(second))
    return yes + torch.sigmoid(-first) * (F.logsigmoid(-first) - F.logsigmoid(-second))


@register_loss("rpo_bwd", paper="2406.11704")
@of_log_ratios()
def rpo_bwd_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    beta: float = 0.2,
    eta: float = 1.0,
) -> Tensor:
    """KL(p* ‖ p), p* = σ(ηΔR), p = σ(βh): the target of the margin is ηΔR, not infinity.

    Reward-aware preference optimization (Nemotron-4 340B), with the KL that the paper calls "backward". r_w and r_l are
    the log-ratios log(π/π_ref) of the chosen and the rejected response, and h = r_w − r_l. ΔR = R_w − R_l is the
    difference between their scores. p is the policy's probability that the chosen response is better, and p* the
    probability that follows from the scores. If the chosen response has the lower score, the loss pushes its reward
    below that of the rejected response. The loss reaches its minimum, 0, at βh = ηΔR. η → ∞ gives DPO.

    Use it on pairs with reward-model scores, if DPO would separate pairs that hardly differ.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs
            (nats).
        chosen_scores, rejected_scores: `[B]`. Scores R_w and R_l.
        beta: > 0. eta: η > 0, reward units per unit of score.

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_positive(eta=eta)
    return _bernoulli_kl(eta * (chosen_scores - rejected_scores), beta * (chosen - rejected))


@register_loss("rpo_fwd", paper="2406.11704")
@of_log_ratios()
def rpo_fwd_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    beta: float = 0.2,
    eta: float = 1.0,
) -> Tensor:
    """KL(p ‖ p*), p = σ(βh), p* = σ(ηΔR): `rpo_bwd` with the arguments of the KL exchanged (the paper's "forward" KL).

    The derivative with respect to βh is p(1 − p)(βh − ηΔR), so pairs that the policy ranks very wrongly have small
    gradients. The symbols and arguments are those of `rpo_bwd_loss`.

    Use it if a few pairs with wrong scores dominate under `rpo_bwd`.

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_positive(eta=eta)
    return _bernoulli_kl(beta * (chosen - rejected), eta * (chosen_scores - rejected_scores))


@register_loss("rpo_sq", paper="2406.11704")
@of_log_ratios()
def rpo_sq_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    beta: float = 0.2,
    eta: float = 1.0,
) -> Tensor:
    """(βh − ηΔR)²: regresses the reward margin on the difference of the scores.

    Reward-aware preference optimization with a squared distance. The symbols and arguments are those of `rpo_bwd_loss`.

    Use it if scores are calibrated, so that the policy should reproduce their differences and not only their order.

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_positive(eta=eta)
    return (beta * (chosen - rejected) - eta * (chosen_scores - rejected_scores)).square()


@register_loss("sppo", paper="2405.00675")
@of_log_ratios()
def sppo_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_win_rates: Tensor,
    rejected_win_rates: Tensor | None = None,
    beta: float = 0.001,
) -> Tensor:
    """½[(r_w − (P_w − ½)/β)² + (r_l − (P_l − ½)/β)²]: moves each log-ratio toward a target set by its win rate.

    Self-play preference optimization. r is a response's log-ratio of policy to reference. P is the win rate of a
    response against the policy's samples for the same prompt. β is the paper's 1/η. Without `rejected_win_rates`, P_w
    is the probability that the chosen response beats the rejected one, and P_l = 1 − P_w. With win rates of 1 and 0,
    the loss is half of `sppo_hard`.

    Use it in rounds: sample responses from the policy, judge them against each other, and train on them. The reference
    of a round is the policy after the previous round.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs
            (nats).
        chosen_win_rates, rejected_win_rates: `[B]`. Win rates P_w and P_l in [0, 1]. beta: > 0.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    if rejected_win_rates is None:
        rejected_win_rates = 1 - chosen_win_rates
    targets = (chosen_win_rates - 0.5) / beta, (rejected_win_rates - 0.5) / beta
    return ((chosen - targets[0]).square() + (rejected - targets[1]).square()) / 2
