"""Pair losses that know by how much the chosen response is better: ODPO, reward-aware RPO, and SPPO with win rates.

r is a response's log-ratio of summed log-probs, policy to reference, in nats, h = r_w − r_l; R is a response's score,
larger for a better one, ΔR = R_w − R_l; every implicit reward here is βr.
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
    """The chosen response has the larger score; for a ratio both are above 0."""
    wrong = ~(chosen_scores > rejected_scores)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise UnsuitableExamples(
            wrong,
            f"its chosen_score {chosen_scores[at].item():g} is not above its rejected_score "
            f"{rejected_scores[at].item():g}, and its margin would be no number: drop the row, or swap its responses",
        )
    wrong = ~(rejected_scores > 0)
    if margin == "ratio" and wrong.any():
        raise UnsuitableExamples(
            wrong,
            f"its rejected_score {rejected_scores[wrong][0].item():g} is not above 0, as margin='ratio' wants it: give "
            "positive scores, or take margin='difference'",
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
    """ℓ(βh − α log ΔR): DPO whose margin is to be the larger, the more the chosen response is better.

    DPO with an offset (ODPO). With `margin="ratio"` the offset is α log(R_w/R_l). α = 0 is DPO.

    Use it on pairs with scores on one scale, of a reward model or of raters, where some differ much more than others.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`, summed, nats.
        chosen_scores, rejected_scores: `[B]`, R_w > R_l (the loss is NaN otherwise; the trainer refuses such rows).
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
    """KL(σ(a) ‖ σ(b)) of two logits, in nats, without a logarithm of a rounded probability."""
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
    """KL(p* ‖ p), p* = σ(ηΔR), p = σ(βh): the margin is led to ηΔR, not to infinity.

    Reward-aware preference optimization (Nemotron-4 340B) with the "backward" KL of its source: that of the scores'
    probability to the policy's. Scores may come in either order: a chosen response with the lower one is led below. The
    loss is least, 0, at βh = ηΔR, and η → ∞ is DPO.

    Use it on pairs with scores of a reward model, where DPO would drive pairs apart that hardly differ.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`, summed, nats.
        chosen_scores, rejected_scores: `[B]`. beta: > 0. eta: η > 0, reward units for one of the scores'.

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
    """KL(p ‖ p*), p = σ(βh), p* = σ(ηΔR): `rpo_bwd` with the KL the other way round, as its source names them.

    Pairs that the policy has far wrong train little: its gradient in βh is p(1 − p)(βh − ηΔR). Arguments as in
    `rpo_bwd_loss`.

    Use it where `rpo_bwd` is pulled about by a few pairs whose scores are wrong.

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
    """(βh − ηΔR)²: the reward margin regressed on the scores'.

    Reward-aware preference optimization with a squared distance. Arguments as in `rpo_bwd_loss`.

    Use it where scores are calibrated and their differences, not only their order, are to come out in the policy.

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
    """½[(r_w − (P_w − ½)/β)² + (r_l − (P_l − ½)/β)²]: each log-ratio is led to what its win rate says.

    Self-play preference optimization with win rates P of each response against the samples of its prompt, β being the
    paper's 1/η. Without `rejected_win_rates`, P_l = 1 − P_w, P_w being how often the chosen one beats the rejected one.
    P = 1 and 0 is half of `sppo_hard`.

    Use it on policy samples judged against each other, in rounds, each with the last round's policy as the reference.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`, summed, nats.
        chosen_win_rates, rejected_win_rates: `[B]`, in [0, 1]. beta: > 0.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    if rejected_win_rates is None:
        rejected_win_rates = 1 - chosen_win_rates
    targets = (chosen_win_rates - 0.5) / beta, (rejected_win_rates - 0.5) / beta
    return ((chosen - targets[0]).square() + (rejected - targets[1]).square()) / 2
