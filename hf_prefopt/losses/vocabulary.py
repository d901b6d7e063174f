"""Pair losses that need the whole predicted distribution of each token: TDPO for its KL, MallowsPO for its entropy.

r = s − s_ref is the log-ratio of policy to reference, summed over a response (nats); h = r_w − r_l; ℓ(z) = −log σ(z).
"""

import torch
from torch import Tensor

from hf_prefopt.losses.base import (
    LossOutput,
    check_positive,
    check_range,
    check_same_shape,
    logistic,
    mean_logps,
    of_log_ratios,
    pair_rewards,
)
from hf_prefopt.losses.registry import register_loss


@register_loss("tdpo1", paper="2404.11999", has_own_divergence=True)
@of_log_ratios()
def tdpo1_loss(
    chosen: Tensor,
    rejected: Tensor,
    policy_chosen_kl: Tensor,
    policy_rejected_kl: Tensor,
    beta: float = 0.1,
) -> LossOutput:
    """ℓ(β(h − (D_l − D_w))), D = Σ_t KL(π_ref(·|y_<t) ‖ π(·|y_<t)) over the vocabulary, differentiated.

    Token-level DPO, first form. r is a response's log-ratio of policy to reference, h = r_w − r_l, and
    ℓ(z) = −log σ(z). D sums the KL divergences at all scored tokens of a response, and has a gradient. The implicit
    reward is β(r + D).

    Use it to keep the policy close to the reference at every token. The authors prefer `tdpo2`.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs
            (nats).
        policy_chosen_kl, policy_rejected_kl: `[B]`. D of each response (nats).
        beta: > 0.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    return _with_divergence(chosen, rejected, policy_chosen_kl, policy_rejected_kl, beta)


@register_loss("tdpo2", paper="2404.11999", has_own_divergence=True)
@of_log_ratios()
def tdpo2_loss(
    chosen: Tensor,
    rejected: Tensor,
    policy_chosen_kl: Tensor,
    policy_rejected_kl: Tensor,
    beta: float = 0.1,
    alpha: float = 0.5,
) -> LossOutput:
    """ℓ(β(h − α(D_l − sg D_w))): TDPO1 without the gradient of the chosen response's KL, and both KLs weighted by α.

    Token-level DPO, second form. The symbols are those of `tdpo1_loss`, and sg stops the gradient. The chosen KL has no
    gradient, so the loss does not increase it. The rejected KL keeps the predictions for the rejected response close to
    the reference. α = 0 gives DPO. The implicit reward is β(r + αD).

    Use it if DPO drifts too far from the reference. The KL takes additional time: for each chunk of tokens, the
    reference's logits are computed together with the policy's.

    Args:
        policy_chosen_kl, policy_rejected_kl: `[B]`. D of each response (nats). alpha: α ≥ 0.

    Raises:
        ValueError: as in `tdpo1_loss`.
    """
    check_range("alpha", alpha, 0.0)
    return _with_divergence(chosen, rejected, alpha * policy_chosen_kl.detach(), alpha * policy_rejected_kl, beta)


def _with_divergence(
    chosen: Tensor, rejected: Tensor, chosen_kl: Tensor, rejected_kl: Tensor, beta: float
) -> LossOutput:
    chosen_rewards, rejected_rewards = beta * (chosen + chosen_kl), beta * (rejected + rejected_kl)
    components = {"chosen_kl": chosen_kl.detach(), "rejected_kl": rejected_kl.detach()}
    return LossOutput(
        logistic(chosen_rewards - rejected_rewards), pair_rewards(chosen_rewards, rejected_rewards), components
    )


@register_loss("mallows_dpo", paper="2405.14953")
@of_log_ratios()
def mallows_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen_normalized_entropy: Tensor,
    ref_rejected_normalized_entropy: Tensor,
    beta: float = 0.1,
    dispersion_scale: float = 1.0,
) -> LossOutput:
    """ℓ(−c log(H)·βh): pairs with a low-entropy reference count more; H is the reference's entropy divided by log V.

    MallowsPO-θ with the paper's proxy for the dispersion, −log H. H is the mean entropy of the reference's predictions
    at the tokens of a response, divided by log V and averaged over the two responses. V is the size of the vocabulary.
    r_w and r_l are the log-ratios log(π/π_ref) of the chosen and the rejected response, h = r_w − r_l, and
    ℓ(z) = −log σ(z). The implicit reward is −c log(H)·βr. See `mallows_dpo_per_token` for the form that the authors
    used.

    Use it if some prompts have one right answer and others have many. Prompts with one right answer then count more.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs
            (nats).
        ref_chosen_normalized_entropy, ref_rejected_normalized_entropy: `[B]`. The mean token entropy of each response
            under the reference, divided by log V, in [0, 1].
        beta: > 0. dispersion_scale: c > 0.

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_positive(dispersion_scale=dispersion_scale)
    dispersion = _dispersion(ref_chosen_normalized_entropy, ref_rejected_normalized_entropy, dispersion_scale)
    return _dispersed(beta * chosen, beta * rejected, dispersion)


@register_loss("mallows_dpo_per_token", paper="2405.14953", is_average_loss=True)
def mallows_dpo_per_token_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    ref_chosen_normalized_entropy: Tensor,
    ref_rejected_normalized_entropy: Tensor,
    beta: float = 10.0,
    dispersion_scale: float = 0.29,
) -> LossOutput:
    """ℓ(−c log(H)·β(s̄_w − s̄_l)): `mallows_dpo` on log-probs per token; the reference is only used for H.

    MallowsPO as configured in the authors' code. s̄ is a response's mean log-prob per scored token under the policy. c,
    H and ℓ are those of `mallows_dpo_loss`. The authors chose c = 0.29, because −c log(H) is then close to 1 on their
    data. The implicit reward is −c log(H)·βs̄.

    Use it to reproduce the results of the authors' code.

    Args:
        policy_chosen_logps, policy_rejected_logps: `[B]`. Summed log-probs (nats).
        chosen_lengths, rejected_lengths: `[B]`. Numbers of scored tokens.
        ref_chosen_normalized_entropy, ref_rejected_normalized_entropy, beta, dispersion_scale: as in
            `mallows_dpo_loss`.

    Raises:
        ValueError: as in `mallows_dpo_loss`.
    """
    check_positive(beta=beta, dispersion_scale=dispersion_scale)
    chosen, rejected = mean_logps(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths)
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        ref_chosen_normalized_entropy=ref_chosen_normalized_entropy,
        ref_rejected_normalized_entropy=ref_rejected_normalized_entropy,
    )
    dispersion = _dispersion(ref_chosen_normalized_entropy, ref_rejected_normalized_entropy, dispersion_scale)
    return _dispersed(beta * chosen, beta * rejected, dispersion)


def _dispersion(chosen_entropy: Tensor, rejected_entropy: Tensor, scale: float) -> Tensor:
    """Return −c log H, `[B]`. H is the mean of the two normalized entropies, clamped so that log H is finite."""
    entropy = ((chosen_entropy + rejected_entropy) / 2).detach()
    return -scale * entropy.clamp(min=torch.finfo(entropy.dtype).tiny).log()


def _dispersed(chosen: Tensor, rejected: Tensor, dispersion: Tensor) -> LossOutput:
    chosen, rejected = dispersion * chosen, dispersion * rejected
    return LossOutput(logistic(chosen - rejected), pair_rewards(chosen, rejected), {"dispersion": dispersion})
