"""Losses of ranked lists: Plackett–Luce, softmax DPO, and RRHF, which need an order of the responses and no more.

Tensors are `[B, K]`, padded where `list_mask` is False; what stands there is never looked at. r is a response's
log-ratio of summed log-probs, policy to reference, in nats. Smaller ranks are better. Responses of equal rank are
equally good: none is preferred to another, and the order in which they stand in a row does not count.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prefopt.kinds.lists import best_of, mean_of
from hf_prefopt.losses.base import LossOutput, check_lists, check_positive, check_range, per_token
from hf_prefopt.losses.registry import register_loss


def list_rewards(policy_list_logps: Tensor, ref_list_logps: Tensor, list_mask: Tensor, beta: float) -> Tensor:
    """βr `[B, K]`, 0 at padding."""
    return beta * torch.where(list_mask, policy_list_logps - ref_list_logps, 0.0)


@register_loss("plackett_luce", aliases=("pl",), paper="2305.18290")
def plackett_luce_loss(
    policy_list_logps: Tensor, ref_list_logps: Tensor, list_ranks: Tensor, list_mask: Tensor, beta: float = 0.1
) -> LossOutput:
    """−Σ_k [βr_k − logsumexp(βr_k, {βr_j of a worse rank})]: the whole ranking under a Plackett–Luce model.

    DPO's general form, appendix A.3; lists of two are DPO. Each response is chosen from itself and all that are worse,
    so responses of equal rank, which the paper does not have, are not compared.

    Use it on fully ranked lists of three or more responses.

    Args:
        policy_list_logps, ref_list_logps: `[B, K]`, summed, nats. list_ranks: `[B, K]`. list_mask: `[B, K]` bool.
        beta: > 0.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    check_positive(beta=beta)
    check_lists(
        policy_list_logps=policy_list_logps, ref_list_logps=ref_list_logps, list_ranks=list_ranks, list_mask=list_mask
    )
    rewards = list_rewards(policy_list_logps, ref_list_logps, list_mask, beta)
    # [b, k, j]: whether response j is there to choose from when k is chosen. Each is so beside itself, padding too: no
    # row of the logsumexp is empty, whose gradient would be NaN.
    worse = (list_ranks[:, None, :] > list_ranks[:, :, None]) & list_mask[:, None, :]
    itself = torch.eye(list_mask.shape[1], dtype=torch.bool, device=list_mask.device)
    totals = torch.logsumexp(torch.where(worse | itself, rewards[:, None, :], -torch.inf), dim=-1)
    return LossOutput(((totals - rewards) * list_mask).sum(1), rewards.detach())


@register_loss("s_dpo", aliases=("softmax_dpo",), paper="2406.09215")
def s_dpo_loss(
    policy_list_logps: Tensor, ref_list_logps: Tensor, list_ranks: Tensor, list_mask: Tensor, beta: float = 1.0
) -> LossOutput:
    """ℓ(−logsumexp_l β(r_l − r_w)): the best response against all others at once.

    Softmax-DPO: one chosen and any number of rejected responses, whose order among each other does not count. The mean
    over w where several responses are equally good; those are not among the l.

    Use it on one good response against several bad ones, as in recommendation.

    Args:
        policy_list_logps, ref_list_logps: `[B, K]`, summed, nats. list_ranks: `[B, K]`. list_mask: `[B, K]` bool.
        beta: > 0.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    check_positive(beta=beta)
    check_lists(
        policy_list_logps=policy_list_logps, ref_list_logps=ref_list_logps, list_ranks=list_ranks, list_mask=list_mask
    )
    rewards = list_rewards(policy_list_logps, ref_list_logps, list_mask, beta)
    best = best_of(list_ranks, list_mask)
    others = torch.where(list_mask & ~best, rewards, -torch.inf).logsumexp(1, keepdim=True)
    return LossOutput(mean_of(F.softplus(others - rewards), best), rewards.detach())


@register_loss("sft_lists", form_of="sft", is_average_loss=True, computes_reward_metrics=False)
def sft_lists_loss(
    policy_list_logps: Tensor, list_lengths: Tensor, list_ranks: Tensor, list_mask: Tensor
) -> LossOutput:
    """NLL(best) = −s̄ of the response of the smallest rank, the mean over several of that rank: `sft` on lists.

    Use it by its name `sft`, or by `sft_weight`, beside losses of lists.

    Raises:
        ValueError: shapes differ.
    """
    check_lists(
        policy_list_logps=policy_list_logps, list_lengths=list_lengths, list_ranks=list_ranks, list_mask=list_mask
    )
    means = torch.where(list_mask, per_token(policy_list_logps, list_lengths), 0.0)
    return LossOutput(-mean_of(means, best_of(list_ranks, list_mask)))


@register_loss("rrhf", paper="2304.05302", is_average_loss=True)
def rrhf_loss(
    policy_list_logps: Tensor, list_lengths: Tensor, list_ranks: Tensor, list_mask: Tensor, sft_coef: float = 1.0
) -> LossOutput:
    """Σ_{i worse than j} max(0, s̄_i − s̄_j) + λ·NLL(best): log-probs per token in the order of the ranks.

    RRHF, the NLL per token like every other here, and the mean over several best ones. The implicit reward is s̄.

    Use it on ranked lists without a reference model, when ranking and imitation should go together.

    Args:
        policy_list_logps: `[B, K]`, summed, nats. list_lengths, list_ranks: `[B, K]`. list_mask: `[B, K]` bool.
        sft_coef: λ ≥ 0.

    Raises:
        ValueError: shapes differ or λ is out of range.
    """
    check_range("sft_coef", sft_coef, 0.0)
    check_lists(
        policy_list_logps=policy_list_logps, list_lengths=list_lengths, list_ranks=list_ranks, list_mask=list_mask
    )
    means = torch.where(list_mask, per_token(policy_list_logps, list_lengths), 0.0)
    worse = (list_ranks[:, :, None] > list_ranks[:, None, :]) & list_mask[:, :, None] & list_mask[:, None, :]
    ranking = (torch.relu(means[:, :, None] - means[:, None, :]) * worse).sum((1, 2))
    nll = -mean_of(means, best_of(list_ranks, list_mask))
    components = {"ranking": ranking.detach(), "nll": nll.detach()}
    return LossOutput(ranking + sft_coef * nll, means.detach(), components)
