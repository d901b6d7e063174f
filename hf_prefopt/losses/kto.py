"""KTO and its paired form: losses from prospect theory. They compare each response with a baseline from the batch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prefopt.losses.base import (
    LossOutput,
    advise_on_labels,
    check_positive,
    check_range,
    check_same_shape,
    of_log_ratios,
)
from hf_prefopt.losses.registry import register_loss


def advise_on_balance(labels: Tensor, desirable_weight: float, undesirable_weight: float) -> str | None:
    """Return advice for the user if the labels are not balanced, or `None` if they are.

    They are balanced if both labels occur and λ_D·n_D / (λ_U·n_U) is in [1, 4/3]. n_D and n_U are the numbers of
    desirable and undesirable examples. λ_D is `desirable_weight`, and λ_U is `undesirable_weight`. If a weight is 0, it
    is enough that both labels occur.
    """
    desirable, undesirable = int(labels.sum()), int((~labels).sum())
    if not min(desirable, undesirable, desirable_weight, undesirable_weight) > 0:
        return advise_on_labels(labels)
    ratio = desirable_weight * desirable / (undesirable_weight * undesirable)
    if 1 - 1e-6 <= ratio <= 4 / 3 + 1e-6:
        return None
    weights = dict(zip(("desirable_weight", "undesirable_weight"), kto_weights(desirable, undesirable), strict=True))
    name, value = max(weights.items(), key=lambda item: item[1])
    cure = f"set {name}={math.ceil(value * 1000) / 1000:g} in loss_params" if value > 1 else "leave both weights at 1"
    return (
        f"{desirable:,} desirable and {undesirable:,} undesirable examples have a weight ratio of {ratio:.3g}; KTO's "
        f"authors recommend 1 to 4/3 for desirable_weight·n_D / (undesirable_weight·n_U): {cure}"
    )


@register_loss("kto", paper="2402.01306", needs_global_batch=True, check_data=advise_on_balance)
def kto_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    policy_mismatched_logps: Tensor,
    ref_mismatched_logps: Tensor,
    labels: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    log_form: bool = False,
) -> LossOutput:
    """λ_D(1−σ(β(r − z))) if desirable, λ_U(1−σ(β(z − r))) if not, z = sg max(0, mean_B r of mismatched pairs).

    Kahneman–Tversky optimization. r is a response's log-ratio of policy to reference. z estimates KL(π‖π_ref) from
    mismatched pairs: each prompt of the global batch, whatever its label, with the response to another prompt. z has no
    gradient (sg), and the component `kl` is z. See `kto_weights` for imbalanced labels.

    Use it on unpaired thumbs-up / thumbs-down data, even if the labels are imbalanced. With `unpair=True`, use it on
    pairs of doubtful quality.

    Args:
        policy_logps, ref_logps: `[B]`. Summed log-probs (nats).
        policy_mismatched_logps, ref_mismatched_logps: `[B]`. Summed log-probs (nats) of the mismatched pairs.
        labels: `[B]` bool. True for desirable examples.
        beta: > 0. desirable_weight, undesirable_weight: λ_D, λ_U ≥ 0.
        log_form: whether to use −log σ instead of 1 − σ, as some descriptions of KTO do.

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_positive(beta=beta)
    check_range("desirable_weight", desirable_weight, 0.0)
    check_range("undesirable_weight", undesirable_weight, 0.0)
    check_same_shape(
        policy_logps=policy_logps,
        ref_logps=ref_logps,
        policy_mismatched_logps=policy_mismatched_logps,
        ref_mismatched_logps=ref_mismatched_logps,
        labels=labels,
    )
    ratios = policy_logps - ref_logps
    baseline = (policy_mismatched_logps - ref_mismatched_logps).mean().clamp(min=0).detach()
    gains = beta * torch.where(labels, ratios - baseline, baseline - ratios)
    losses = -F.logsigmoid(gains) if log_form else torch.sigmoid(-gains)
    losses = torch.where(labels, desirable_weight * losses, undesirable_weight * losses)
    return LossOutput(losses, (beta * ratios).detach()[:, None], {"kl": baseline.expand_as(losses)})


def kto_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """Return (λ_D, λ_U) that balance n_D desirable and n_U undesirable examples.

    KTO's authors recommend λ_D·n_D / (λ_U·n_U) in [1, 4/3] (2402.01306). If the numbers are outside this range at
    weights of 1, one of the weights is increased just enough to reach it.

    Example:
        >>> kto_weights(100, 80), kto_weights(100, 200), kto_weights(300, 100)
        ((1.0, 1.0), (2.0, 1.0), (1.0, 2.25))

    Raises:
        ValueError: one label has no examples, so no weights can balance the labels.
    """
    if desirable < 1 or undesirable < 1:
        raise ValueError(f"{desirable} desirable and {undesirable} undesirable examples cannot be balanced by weights")
    ratio = desirable / undesirable
    return max(1.0, 1 / ratio), max(1.0, ratio * 3 / 4)


@register_loss("kto_pair", paper="2402.01306", needs_global_batch=True)
@of_log_ratios()
def kto_pair_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """½[1−σ(β(r_w − z_l)) + 1−σ(β(z_w − r_l))], z_x = sg max(0, mean_B r_x): KTO on pairs.

    Kahneman–Tversky optimization in the paired form of the authors' first code release. r is a response's log-ratio of
    policy to reference. The baseline for chosen responses is z_l, computed from the rejected responses of the global
    batch. The baseline for rejected responses is z_w, computed from the chosen ones. Baselines are at least 0 and have
    no gradient (sg). The loss of a pair is the mean over its two responses.

    Use it on pairs if you want KTO's saturating loss without its forward pass over mismatched pairs.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs
            (nats).
        beta: > 0.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    chosen_baseline, rejected_baseline = (side.mean().clamp(min=0).detach() for side in (chosen, rejected))
    chosen_losses = torch.sigmoid(-beta * (chosen - rejected_baseline))
    rejected_losses = torch.sigmoid(-beta * (chosen_baseline - rejected))
    return (chosen_losses + rejected_losses) / 2
