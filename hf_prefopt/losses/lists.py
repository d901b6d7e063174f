"""Losses that need only the order of a list's responses: Plackett–Luce, softmax DPO, and RRHF.

Tensors are `[B, K]`, for B lists of up to K responses. Entries where `list_mask` is False are padding and are ignored.
r is the log-ratio of policy to reference, summed over a response (nats). Smaller ranks are better. Responses with equal
ranks are equally good: none is preferred to another, and their order in the row does not matter.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prefopt.kinds.lists import best_of, mean_of
from hf_prefopt.losses.base import LossOutput, check_lists, check_positive, check_range, per_token
from hf_prefopt.losses.registry import register_loss


def list_rewards(
    policy_list_logps: Tensor, ref_list_logps: Tensor, list_mask: Tensor, beta: float, **compared: Tensor
) -> Tensor:
    """Return the implicit rewards βr, `[B, K]`, which are 0 for padding.

    Args:
        **compared: the ranks or the scores, `[B, K]`; only their shape is checked.

    Raises:
        ValueError: shapes differ.
    """
    check_lists(policy_list_logps=policy_list_logps, ref_list_logps=ref_list_logps, **compared, list_mask=list_mask)
    return beta * torch.where(list_mask, policy_list_logps - ref_list_logps, 0.0)


@register_loss("plackett_luce", aliases=("pl",), paper="2305.18290")
def plackett_luce_loss(
    policy_list_logps: Tensor, ref_list_logps: Tensor, list_ranks: Tensor, list_mask: Tensor, beta: float = 0.1
) -> LossOutput:
    """−Σ_k [βr_k − logsumexp(βr_k, {βr_j of a worse rank})]: the NLL of the ranking under a Plackett–Luce model.

    The general form of DPO, appendix A.3 of the DPO paper; for lists of two it is DPO. r_k is the log-ratio
    log(π/π_ref) of response k. In the Plackett–Luce model, each response is chosen from the set of itself and all worse
    responses. Responses with equal ranks are therefore not compared with each other; the paper does not consider them.

    Use it on fully ranked lists of three or more responses.

    Args:
        policy_list_logps, ref_list_logps: `[B, K]`. Summed log-probs (nats). list_ranks: `[B, K]`. Smaller is better.
        list_mask: `[B, K]` bool. False for padding. beta: > 0.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    check_positive(beta=beta)
    rewards = list_rewards(policy_list_logps, ref_list_logps, list_mask, beta, list_ranks=list_ranks)
    # Entry [b, k, j] says whether response j is a candidate when response k is chosen. Every response, including
    # padding, is a candidate for itself, because the gradient of a logsumexp over no candidates would be NaN.
    worse = (list_ranks[:, None, :] > list_ranks[:, :, None]) & list_mask[:, None, :]
    itself = torch.eye(list_mask.shape[1], dtype=torch.bool, device=list_mask.device)
    totals = torch.logsumexp(torch.where(worse | itself, rewards[:, None, :], -torch.inf), dim=-1)
    return LossOutput(((totals - rewards) * list_mask).sum(1), rewards.detach())


@register_loss("s_dpo", aliases=("softmax_dpo",), paper="2406.09215")
def s_dpo_loss(
    policy_list_logps: Tensor, ref_list_logps: Tensor, list_ranks: Tensor, list_mask: Tensor, beta: float = 1.0
) -> LossOutput:
    """ℓ(−logsumexp_l β(r_l − r_w)): compares the best response with all others at once.

    Softmax-DPO compares one chosen response w with any number of rejected responses l. The order of the rejected ones
    does not matter. r is a response's log-ratio of policy to reference, and ℓ(z) = −log σ(z). If several responses
    share the best rank, each of them is w once, none of them is an l, and the loss is the mean over these w.

    Use it for lists of one good response and several bad ones, as in recommendation.

    Args:
        policy_list_logps, ref_list_logps: `[B, K]`. Summed log-probs (nats). list_ranks: `[B, K]`. Smaller is better.
        list_mask: `[B, K]` bool. False for padding. beta: > 0.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    check_positive(beta=beta)
    rewards = list_rewards(policy_list_logps, ref_list_logps, list_mask, beta, list_ranks=list_ranks)
    best = best_of(list_ranks, list_mask)
    others = torch.where(list_mask & ~best, rewards, -torch.inf).logsumexp(1, keepdim=True)
    return LossOutput(mean_of(F.softplus(others - rewards), best), rewards.detach())


@register_loss("sft_lists", form_of="sft", is_average_loss=True, computes_reward_metrics=False)
def sft_lists_loss(
    policy_list_logps: Tensor, list_lengths: Tensor, list_ranks: Tensor, list_mask: Tensor
) -> LossOutput:
    """NLL(best) = −s̄ of the response with the smallest rank, averaged over ties: `sft` on lists.

    s̄ is a response's summed log-prob divided by its number of scored tokens. The loss `sft` takes this form if the
    dataset has lists.

    Use it through the name `sft` or through `sft_weight`, in combination with losses of lists.

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
    """Σ_{i worse than j} max(0, s̄_i − s̄_j) + λ·NLL(best): puts the log-probs per token in the order of the ranks.

    RRHF. s̄ is a response's mean log-prob per scored token, and the NLL is −s̄. If several responses share the best
    rank, the NLL is averaged over them. The implicit reward is s̄.

    Use it on ranked lists without a reference model, to combine ranking with imitation of the best response.

    Args:
        policy_list_logps: `[B, K]`. Summed log-probs (nats). list_lengths: `[B, K]`. Numbers of scored tokens.
        list_ranks: `[B, K]`. Smaller is better. list_mask: `[B, K]` bool. False for padding.
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
