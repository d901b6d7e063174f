"""DPO and its closest variants, for pairs with a reference: functions of h = r_w − r_l, or of both log-ratios.

r = s − s_ref is the log-ratio of policy to reference, summed over a response (nats). w is the chosen response and l the
rejected one. A formula under `@of_log_ratios` takes r_w and r_l. The resulting loss takes the four summed log-probs,
preferably by keyword, and returns a `LossOutput`.
"""

import torch
from torch import Tensor

from hf_prefopt.losses.base import (
    LossOutput,
    check_one_confidence,
    check_range,
    check_same_shape,
    less_margins,
    logistic,
    of_log_ratios,
    pair_rewards,
    per_token,
)
from hf_prefopt.losses.registry import register_loss


@register_loss("dpo", aliases=("sigmoid",), paper="2305.18290")
@of_log_ratios(reference_free=True)
def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    margins: Tensor | None = None,
    chosen_win_rates: Tensor | None = None,
) -> Tensor:
    """(1−ε)ℓ(βh) + εℓ(−βh), h = r_w − r_l; ε > 0 gives conservative DPO.

    Direct Preference Optimization, eq. 7. r_w and r_l are the log-ratios log(π/π_ref) of the chosen and the rejected
    response, and ℓ(z) = −log σ(z). ε is the probability that a label is flipped (cDPO note, eq. 3). With win rates p
    (`use_win_rates=True`), each pair has its own ε = 1 − p. These are soft labels, as in MMPO (2410.03145).

    Use it first, as the baseline for all other losses.

    Args:
        policy_chosen_logps, policy_rejected_logps: `[B]`. Summed log-probs (nats) under the policy.
        ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs (nats) under the reference. If they are left out,
            the policy's summed log-probs replace r.
        beta: strength of the regularization toward the reference, > 0.
        label_smoothing: ε in [0, 0.5).
        margins: `[B]`. The target margin m of each pair, in reward units. βh − m then replaces βh, as in ODPO
            (2402.10571).
        chosen_win_rates: `[B]`. The probability p in [0, 1] that the chosen response is the better one. It cannot be
            combined with margins or with ε > 0.

    Raises:
        ValueError: shapes differ, only one of the reference log-probs is given, a hyperparameter is out of range, or
            win rates are combined with ε > 0 or margins.
    """
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    check_one_confidence(chosen_win_rates, label_smoothing, margins)
    return logistic(less_margins(beta * (chosen - rejected), margins), label_smoothing, chosen_win_rates)


def reference_free_dpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, beta: float = 0.1) -> LossOutput:
    """Compute ℓ(β(s_w − s_l)), DPO with a uniform reference, from sums `[B]` or masked token log-probs `[B, T]`.

    s_w and s_l are the policy's summed log-probs of the chosen and the rejected response, and ℓ(z) = −log σ(z). A
    uniform reference gives all responses the same probability.

    Args:
        chosen_logps, rejected_logps: the policy's summed log-probs s, `[B]`, or its token log-probs, `[B, T]`. Tokens
            that do not count must be 0.
        beta: > 0.

    Raises:
        ValueError: the batch sizes differ, there are more than two dimensions, or beta is not above 0.
    """
    if chosen_logps.dim() not in (1, 2) or rejected_logps.dim() not in (1, 2):
        raise ValueError(
            "reference-free DPO takes [B] sums or [B, T] token log-probs, got "
            f"{tuple(chosen_logps.shape)} and {tuple(rejected_logps.shape)}"
        )
    summed = (logps.sum(-1) if logps.dim() == 2 else logps for logps in (chosen_logps, rejected_logps))
    return dpo_loss(*summed, beta=beta)


@register_loss("dpo_norm", aliases=("sigmoid_norm",), paper="2411.15124", is_average_loss=True)
@of_log_ratios(reference_free=True)
def dpo_norm_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 5.0,
    label_smoothing: float = 0.0,
    margins: Tensor | None = None,
    chosen_win_rates: Tensor | None = None,
) -> LossOutput:
    """ℓ(β(r̄_w − r̄_l)): DPO on log-ratios per token.

    Length-normalized DPO, Tülu 3, eq. 6. r̄ is a response's summed log-ratio of policy to reference, divided by its
    number of scored tokens, and ℓ(z) = −log σ(z). The arguments are those of `dpo_loss` and the numbers of scored
    tokens `chosen_lengths` and `rejected_lengths`, each `[B]`.

    Use it if DPO makes responses longer: a long response no longer has a larger log-ratio only because of its length.

    Raises:
        ValueError: as in `dpo_loss`.
    """
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    check_one_confidence(chosen_win_rates, label_smoothing, margins)
    chosen, rejected = per_token(chosen, chosen_lengths), per_token(rejected, rejected_lengths)
    excess = less_margins(beta * (chosen - rejected), margins)
    losses = logistic(excess, label_smoothing, chosen_win_rates)
    return LossOutput(losses, pair_rewards(beta * chosen, beta * rejected))


@register_loss("ipo", paper="2310.12036", is_average_loss=True)
@of_log_ratios(reference_free=True)
def ipo_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 0.1,
    length_normalize: bool = True,
) -> LossOutput:
    """(r̄_w − r̄_l − 1/(2β))²: a finite target margin, so that deterministic preferences are not overfitted.

    Identity preference optimization, eq. 17; β is the paper's τ. r is a response's summed log-ratio log(π/π_ref), and
    r̄ is r divided by the number of scored tokens. With `length_normalize=False`, r replaces r̄, as in the paper. The
    authors' experiments average over the tokens, and so do most projects by default. The implicit reward is β·r̄ (or
    β·r). The loss reaches its minimum at a reward margin of 1/2.

    Use it if preferences are nearly deterministic and DPO's margins grow without bound.

    Raises:
        ValueError: as in `dpo_loss`.
    """
    if length_normalize:
        chosen, rejected = per_token(chosen, chosen_lengths), per_token(rejected, rejected_lengths)
    return LossOutput((chosen - rejected - 1 / (2 * beta)).square(), pair_rewards(beta * chosen, beta * rejected))


@register_loss("hinge", paper="2309.06657")
@of_log_ratios(reference_free=True)
def hinge_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.05, margins: Tensor | None = None) -> Tensor:
    """max(0, 1 − βh): a pair beyond the margin has no gradient.

    The loss "hinge-norm" of statistical rejection sampling optimization (RSO); β is the paper's γ. r_w and r_l are the
    log-ratios log(π/π_ref) of the chosen and the rejected response, and h = r_w − r_l. `margins` are those of
    `dpo_loss`.

    Use it if pairs that are already clearly separated should no longer be trained on.

    Raises:
        ValueError: as in `dpo_loss`.
    """
    return torch.relu(1 - less_margins(beta * (chosen - rejected), margins))


@register_loss("wpo", paper="2406.11827")
@of_log_ratios(reference_free=True)
def wpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    policy_chosen_alignment: Tensor,
    policy_rejected_alignment: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_win_rates: Tensor | None = None,
) -> Tensor:
    """sg[min(1, w_w·w_l)]·ℓ(βh): off-policy pairs weigh less; w = exp(mean_t(log π_t − log Σ_v π_v²)).

    Weighted preference optimization, eq. 2 with the sampled-alignment weights of section 3.2. r_w and r_l are the
    log-ratios log(π/π_ref) of the chosen and the rejected response, h = r_w − r_l, and ℓ(z) = −log σ(z). π_t is the
    policy's probability of token t of a response, and π_v that of a vocabulary entry v at this position. The weight
    min(1, w_w·w_l) has no gradient (sg).

    Use it on pairs written by other models: pairs that are unlikely under the policy count less.

    Args:
        policy_chosen_alignment, policy_rejected_alignment: `[B]`. log w of each response (nats per token).
        label_smoothing, chosen_win_rates: as in `dpo_loss`.

    Raises:
        ValueError: as in `dpo_loss`.
    """
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    check_one_confidence(chosen_win_rates, label_smoothing)
    losses = logistic(beta * (chosen - rejected), label_smoothing, chosen_win_rates)
    return losses * wpo_weights(policy_chosen_alignment, policy_rejected_alignment, losses)


def wpo_weights(chosen_alignment: Tensor, rejected_alignment: Tensor, losses: Tensor) -> Tensor:
    """Return the WPO weight min(1, w_w·w_l) of each pair, `[B]`, without gradients.

    Args:
        chosen_alignment, rejected_alignment: `[B]`. log w of each response; see `wpo_loss`.
        losses: `[B]`. The losses that the weights will multiply; only their shape is checked.

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape(
        policy_chosen_alignment=chosen_alignment, policy_rejected_alignment=rejected_alignment, losses=losses
    )
    return (chosen_alignment + rejected_alignment).detach().clamp(max=0).exp()
