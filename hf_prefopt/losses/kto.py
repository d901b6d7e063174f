"""KTO's family: prospect-theoretic losses that compare each response with a baseline of the batch."""

import torch
from torch import Tensor

from hf_prefopt.losses.base import LossOutput, check_positive, check_same_shape, pair_rewards
from hf_prefopt.losses.registry import register_loss


@register_loss("kto_pair", paper="2402.01306", needs_global_batch=True)
def kto_pair_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float = 0.1,
) -> LossOutput:
    """½[1−σ(β(r_w − z_l)) + 1−σ(β(z_w − r_l))], z_x = sg max(0, mean_B r_x): KTO on pairs.

    Kahneman–Tversky optimisation in the paired form of the authors' first code release: each side's baseline is the
    mean log-ratio of the *other* side over the global batch, clamped at 0 and not differentiated. The loss of a pair is
    the mean over its two responses.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`, summed, nats.
        beta: > 0.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    check_positive(beta=beta)
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    chosen, rejected = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
    chosen_baseline, rejected_baseline = (side.mean().clamp(min=0).detach() for side in (chosen, rejected))
    chosen_losses = torch.sigmoid(-beta * (chosen - rejected_baseline))
    rejected_losses = torch.sigmoid(-beta * (chosen_baseline - rejected))
    return LossOutput((chosen_losses + rejected_losses) / 2, pair_rewards(beta * chosen, beta * rejected))
