"""Pair losses that depend on r_w and r_l separately, not only on their difference.

r = s − s_ref is the log-ratio of policy to reference, summed over a response (nats); r_w is that of the chosen
response, and r_l that of the rejected one. ℓ(z) = −log σ(z). All these losses need a reference. Every implicit reward
here is βr.
"""

import torch
from torch import Tensor

from hf_prefopt.losses.base import LossOutput, check_range, logistic, of_log_ratios, pair_rewards
from hf_prefopt.losses.registry import register_loss


@register_loss("nca_pair", paper="2402.05369")
@of_log_ratios()
def nca_pair_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.01) -> Tensor:
    """ℓ(βr_w) + ½ℓ(−βr_w) + ½ℓ(−βr_l): classifies the chosen response as data, and both responses as noise.

    Noise contrastive alignment for two responses whose rewards are far apart. r_w and r_l are the log-ratios
    log(π/π_ref) of the chosen and the rejected response, and ℓ(z) = −log σ(z). If r_w grows so far that σ(βr_w) > 2/3,
    the loss grows again, so the likelihood of the chosen response stays bounded.

    Use it if DPO lowers the likelihood of the chosen responses.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs
            (nats).
        beta: > 0.

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    chosen, rejected = beta * chosen, beta * rejected
    return logistic(chosen) + logistic(-chosen) / 2 + logistic(-rejected) / 2


@register_loss("sppo_hard", paper="2405.00675")
@of_log_ratios()
def sppo_hard_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.001) -> Tensor:
    """(r_w − 1/(2β))² + (r_l + 1/(2β))²: moves each log-ratio toward its own target.

    Self-play preference optimization, eq. 4.7 with a win rate of 1 for the chosen and 0 for the rejected response. r is
    a response's log-ratio of policy to reference, and β is the paper's 1/η. The targets correspond to implicit rewards
    βr of ½ and −½. Beyond its target, each term of the loss grows again.

    Use it in rounds of self-play, on pairs of the model's own responses with clear winners.

    Raises:
        ValueError: as in `nca_pair_loss`.
    """
    return _distance_to_targets(chosen, rejected, beta)


def _distance_to_targets(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Return (r_w − 1/(2β))² + (r_l + 1/(2β))²."""
    target = 1 / (2 * beta)
    return (chosen - target).square() + (rejected + target).square()


@register_loss("cal_dpo", aliases=("caldpo",), paper="2412.14516")
@of_log_ratios()
def cal_dpo_loss(chosen: Tensor, rejected: Tensor, beta: float = 1e-3, calibration_weight: float = 0.5) -> LossOutput:
    """ℓ(h) + w[(r_w − 1/(2β))² + (r_l + 1/(2β))²], h = r_w − r_l: DPO with rewards on an absolute scale.

    Calibrated DPO. r_w and r_l are the log-ratios of policy to reference, and ℓ(z) = −log σ(z). h is not scaled by β; β
    only sets the targets ±1/(2β). The weight w is ½ in the authors' code and 1 in the paper's listing. w = 0 gives DPO
    at β = 1.

    Use it if DPO lowers the chosen likelihood, and if the absolute values of the rewards matter.

    Args:
        calibration_weight: w ≥ 0.

    Raises:
        ValueError: as in `nca_pair_loss`.
    """
    check_range("calibration_weight", calibration_weight, 0.0)
    preference, calibration = logistic(chosen - rejected), _distance_to_targets(chosen, rejected, beta)
    return LossOutput(
        preference + calibration_weight * calibration,
        pair_rewards(beta * chosen, beta * rejected),
        {"preference": preference.detach(), "calibration": calibration.detach()},
    )


@register_loss("apo_zero", paper="2408.06266")
@of_log_ratios()
def apo_zero_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """1 − σ(βr_w) + σ(βr_l): raises the chosen and lowers the rejected response, each relative to the reference.

    Anchored preference optimization, APO-zero, eq. 7. r_w and r_l are the log-ratios log(π/π_ref) of the chosen and the
    rejected response, and σ is the logistic function.

    Use it if the chosen responses are better than what the model writes now, so that their likelihood should rise.

    Raises:
        ValueError: as in `nca_pair_loss`.
    """
    chosen, rejected = beta * chosen, beta * rejected
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@register_loss("apo_down", paper="2408.06266")
@of_log_ratios()
def apo_down_loss(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """σ(βr_w) + 1 − σ(β(r_w − r_l)): lowers both responses, and the rejected one more.

    Anchored preference optimization, APO-down, eq. 8. r_w and r_l are the log-ratios log(π/π_ref) of the chosen and the
    rejected response. If |r_w| < |r_w − r_l|, the loss increases with the likelihood of the chosen response, as
    intended.

    Use it if even the chosen responses are worse than what the model writes now.

    Raises:
        ValueError: as in `nca_pair_loss`.
    """
    chosen, rejected = beta * chosen, beta * rejected
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
