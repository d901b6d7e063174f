"""Pair losses that replace DPO's ℓ(z) = −log σ(z) by another function of the margin z = βh, h = r_w − r_l.

r = s − s_ref is the log-ratio of policy to reference, summed over a response (nats). Without a reference, r = s, the
policy's summed log-prob. Every implicit reward here is βr. The losses `hinge` and `ipo` are of the same form; they are
in `losses.dpo`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prefopt.losses.base import check_range, exp_to_tangent, logistic, of_log_ratios
from hf_prefopt.losses.registry import register_loss


@register_loss("robust", aliases=("robust_dpo",), paper="2403.00409")
@of_log_ratios(reference_free=True)
def robust_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """[(1−ε)ℓ(βh) − εℓ(−βh)]/(1−2ε): an unbiased DPO loss for labels that are flipped with probability ε.

    Provably robust DPO (rDPO). r_w and r_l are the log-ratios log(π/π_ref) of the chosen and the rejected response,
    h = r_w − r_l, and ℓ(z) = −log σ(z). The expectation of the loss over the flips equals DPO's loss on correct labels.
    ε = 0 gives DPO.

    Use it if you know roughly what share of the labels is flipped.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs
            (nats).
        beta: > 0. label_smoothing: ε in [0, 0.5). At 0.5, labels carry no information, and the loss is undefined.

    Raises:
        ValueError: shapes differ, only one of the reference log-probs is given, or a hyperparameter is out of range.
    """
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    margin = beta * (chosen - rejected)
    kept, flipped = (1 - label_smoothing) * logistic(margin), label_smoothing * logistic(-margin)
    return (kept - flipped) / (1 - 2 * label_smoothing)


@register_loss("exo_pair", aliases=("exo_pref",), paper="2402.00856")
@of_log_ratios(reference_free=True)
def exo_pair_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """q_w log(q_w/(1−ε)) + q_l log(q_l/ε), q_w = σ(βh) = 1 − q_l: the reverse KL(q‖p) to soft labels p = (1−ε, ε).

    Efficient exact optimization, EXO-pref, eq. 16 for two responses. r_w and r_l are the log-ratios log(π/π_ref) of the
    chosen and the rejected response, and h = r_w − r_l. The loss is 0 at βh = log((1−ε)/ε), and grows again for larger
    βh.

    Use it instead of DPO if the policy should be mode-seeking (reverse KL) rather than mode-covering.

    Args:
        label_smoothing: ε in (0, 0.5); at 0 the reverse KL is infinite.

    Raises:
        ValueError: as in `robust_loss`.
    """
    check_range("label_smoothing", label_smoothing, 0.0, 0.5, open_low=True)
    margin = beta * (chosen - rejected)
    chosen_part = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
    rejected_part = torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(label_smoothing))
    return chosen_part + rejected_part


@register_loss("discopop", aliases=("lrml",), paper="2406.08414")
@of_log_ratios(reference_free=True)
def discopop_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.05, discopop_tau: float = 0.05) -> Tensor:
    """(1−m)ℓ(βh) + m·e^(−βh), m = σ(βh/τ): logistic for pairs ranked wrongly, exponential for those ranked right.

    Discovered preference optimization (DiscoPOP), the log-ratio modulated loss, eq. 5. r_w and r_l are the log-ratios
    log(π/π_ref) of the chosen and the rejected response, h = r_w − r_l, and ℓ(z) = −log σ(z). The loss is not
    monotonic: with the default β and τ, it increases from h ≈ −2.37 to h ≈ 1.44. If τ ≤ 1, the product m·e^(−βh) is
    bounded. It is computed as the exponential of a sum of logarithms, so that no factor overflows.

    Use it as an alternative to DPO that was found by a search over losses. Compare both losses on your own data.

    Args:
        discopop_tau: τ in (0, 1]; above 1, e^(−βh) outgrows m, and the loss explodes on wrongly ranked pairs.

    Raises:
        ValueError: as in `robust_loss`.
    """
    check_range("discopop_tau", discopop_tau, 0.0, 1.0, open_low=True, closed_high=True)
    margin = beta * (chosen - rejected)
    modulation = margin / discopop_tau
    exponential = torch.exp(F.logsigmoid(modulation) - margin)
    return torch.sigmoid(-modulation) * logistic(margin) + exponential


# The losses in table 1 of the GPO paper, as functions of z = βh. Below z = −20, e^(−z) is replaced by its tangent.
GPO_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": logistic,
    "hinge": lambda z: torch.relu(1 - z),
    "square": lambda z: (z - 1).square(),
    "exponential": lambda z: exp_to_tangent(-z),
    "truncated_square": lambda z: torch.relu(1 - z).square(),
    "savage": lambda z: torch.sigmoid(-z).square(),
}


@register_loss("gpo", paper="2402.05749")
@of_log_ratios(reference_free=True)
def gpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1, function: str = "logistic") -> Tensor:
    """f(βh): logistic, hinge (1−z)₊, square (z−1)², exponential e^−z, truncated_square (1−z)₊², savage 1/(1+e^z)².

    Generalized preference optimization, table 1, implemented from the paper because no code is published. The functions
    f are losses of binary classification, given above in z = βh. r_w and r_l are the log-ratios log(π/π_ref) of the
    chosen and the rejected response, and h = r_w − r_l. All functions except savage are convex. With "logistic" the
    loss equals `dpo`, and with "hinge" it equals `hinge`. With "square" it is β² times `ipo` with
    `length_normalize=False` and half the β. These other losses have other default values of β.

    Use it to compare convex losses under the same settings, or for functions that no other loss here covers.

    Args:
        function: a name in `GPO_FUNCTIONS`.

    Raises:
        ValueError: as in `robust_loss`, or the function is unknown.
    """
    if function not in GPO_FUNCTIONS:
        raise ValueError(f"function={function!r} is not one of {', '.join(GPO_FUNCTIONS)}")
    return GPO_FUNCTIONS[function](beta * (chosen - rejected))


@register_loss("cauchy", paper="2405.14953")
@of_log_ratios(reference_free=True)
def cauchy_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """−log(atan(βh)/π + ½): models preferences with a Cauchy distribution; its heavy tails tolerate wrong labels.

    The formula is from the code published with MallowsPO; the paper does not derive it. r_w and r_l are the log-ratios
    (policy to reference) of the chosen and the rejected response, and h = r_w − r_l. The probability atan(βh)/π + ½,
    with π = 3.14…, is computed as atan2(1, −βh)/π. The two are equal, but the second does not lose precision for
    βh → −∞.

    Use it if labels are noisy, and if a few pairs that the policy ranks very wrongly should not dominate.

    Raises:
        ValueError: as in `robust_loss`.
    """
    margin = beta * (chosen - rejected)
    return -torch.log(torch.atan2(torch.ones_like(margin), -margin) / math.pi)


@register_loss("focal_po", aliases=("focalpo",), paper="2501.06645")
@of_log_ratios(reference_free=True)
def focal_po_loss(
    chosen: Tensor,
    rejected: Tensor,
    beta: float = 0.1,
    gamma: float = 0.05,
    detach_weight: bool = False,
) -> Tensor:
    """−p^γ log p, p = σ(βh): pairs that the policy ranks wrongly weigh less.

    FocalPO is the focal loss with the factor p^γ instead of (1−p)^γ. r_w and r_l are the log-ratios log(π/π_ref) of the
    chosen and the rejected response, and h = r_w − r_l. γ = 0 gives DPO.

    The authors' code is not published, so this loss follows the paper's description. The paper does not say whether the
    factor p^γ is differentiated. By default it is. The derivative with respect to h, −p^γ(1−p)(1 + γ log p)β, then
    changes its sign below p = e^(−1/γ), which is 2e-9 for the default γ. With `detach_weight=True` the factor only
    scales DPO's gradient.

    Use it if pairs that the model ranks wrongly are mostly noise, and correctly ranked pairs should be separated
    further.

    Args:
        gamma: γ ≥ 0. detach_weight: whether to exclude p^γ from the gradient.

    Raises:
        ValueError: as in `robust_loss`.
    """
    check_range("gamma", gamma, 0.0)
    losses = logistic(beta * (chosen - rejected))
    weight = torch.exp(-gamma * losses)
    return (weight.detach() if detach_weight else weight) * losses
