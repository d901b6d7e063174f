"""Losses of lists whose responses have scores R: InfoNCA, NCA, EXO, and LiPO's lambda loss. Larger scores are better.

Tensors are `[B, K]`; entries where `list_mask` is False are padding and are ignored. r is the log-ratio of policy to
reference, summed over a response (nats); p = softmax(R / temperature) over a list.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prefopt.losses.base import LossOutput, UnsuitableExamples, check_positive
from hf_prefopt.losses.lists import list_rewards
from hf_prefopt.losses.registry import register_loss


def _targets(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the softmax over the responses of each list, 0 at padding."""
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=1)


def _log_softmax(rewards: Tensor, mask: Tensor) -> Tensor:
    """Return the log softmax over the responses of each list, 0 at padding."""
    return torch.where(mask, torch.log_softmax(rewards.masked_fill(~mask, -torch.inf), dim=1), 0.0)


@register_loss("infonca", aliases=("info_nca",), paper="2402.05369")
def infonca_loss(
    policy_list_logps: Tensor,
    ref_list_logps: Tensor,
    list_scores: Tensor,
    list_mask: Tensor,
    beta: float = 0.01,
    alpha: float = 1e-4,
) -> LossOutput:
    """−Σ p log softmax(βr), p = softmax(R/α): the cross-entropy from the softmax of the scores to the policy's.

    InfoNCA. The default α is from the authors' code and puts nearly all of p on the best response.

    Use it on lists of two or more scored responses to a prompt.

    Args:
        policy_list_logps, ref_list_logps, list_scores: `[B, K]`; sums in nats. list_mask: `[B, K]` bool.
        beta: > 0. alpha: > 0, in the unit of the scores.

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_positive(beta=beta, alpha=alpha)
    rewards = list_rewards(policy_list_logps, ref_list_logps, list_mask, beta, list_scores=list_scores)
    targets = _targets(list_scores / alpha, list_mask)
    return LossOutput(-(targets * _log_softmax(rewards, list_mask)).sum(1), rewards.detach())


@register_loss("nca", paper="2402.05369")
def nca_loss(
    policy_list_logps: Tensor,
    ref_list_logps: Tensor,
    list_scores: Tensor,
    list_mask: Tensor,
    beta: float = 0.01,
    alpha: float = 1e-4,
) -> LossOutput:
    """−Σ p log σ(βr) − (1/K)Σ log σ(−βr), p = softmax(R/α): like InfoNCA, but anchored at the reference's likelihoods.

    Noise contrastive alignment; arguments as in `infonca_loss`. K is the length of each list.

    Use it on lists of scored responses, if the likelihood of the best response must not fall.

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_positive(beta=beta, alpha=alpha)
    rewards = list_rewards(policy_list_logps, ref_list_logps, list_mask, beta, list_scores=list_scores)
    targets = _targets(list_scores / alpha, list_mask)
    noise = (F.logsigmoid(-rewards) * list_mask).sum(1) / list_mask.sum(1)
    return LossOutput(-(targets * F.logsigmoid(rewards)).sum(1) - noise, rewards.detach())


@register_loss("exo_rw", aliases=("exo",), paper="2402.00856")
def exo_rw_loss(
    policy_list_logps: Tensor,
    ref_list_logps: Tensor,
    list_scores: Tensor,
    list_mask: Tensor,
    beta: float = 1.0,
    tau: float = 1.0,
) -> LossOutput:
    """KL(softmax(βr) ‖ softmax(R/τ)): the reverse KL from the policy's softmax to the softmax of the scores.

    Efficient exact optimization with rewards.

    Use it on lists with reward-model scores for mode-seeking behavior (reverse KL); `infonca` is mode-covering.

    Args:
        policy_list_logps, ref_list_logps, list_scores: `[B, K]`; sums in nats. list_mask: `[B, K]` bool.
        beta: > 0. tau: > 0, in the unit of the scores.

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_positive(beta=beta, tau=tau)
    rewards = list_rewards(policy_list_logps, ref_list_logps, list_mask, beta, list_scores=list_scores)
    policy, data = (_log_softmax(values, list_mask) for values in (rewards, list_scores / tau))
    return LossOutput((policy.exp() * (policy - data) * list_mask).sum(1), rewards.detach())


def _check_gains(list_scores: Tensor, list_mask: Tensor, normalize_scores: bool) -> None:
    """Check that scores are gains in [0, 1], unless `normalize_scores` rescales them."""
    outside = ((list_scores < 0) | (list_scores > 1)) & list_mask
    if outside.any() and not normalize_scores:
        raise UnsuitableExamples(
            outside.any(dim=1),
            f"its scores reach {list_scores[outside][0].item():g}, but 2^R requires gains in [0, 1]: rescale them, or "
            "pass normalize_scores=True in loss_params",
        )


@register_loss("lipo", aliases=("lambda", "lipo_lambda"), paper="2402.01878", check_data=_check_gains)
def lipo_loss(
    policy_list_logps: Tensor,
    ref_list_logps: Tensor,
    list_scores: Tensor,
    list_mask: Tensor,
    beta: float = 0.05,
    normalize_scores: bool = False,
) -> LossOutput:
    """Σ_{R_i > R_j} Δ_ij ℓ(β(r_i − r_j)), Δ_ij = |2^R_i − 2^R_j|·|1/log(1+τ_i) − 1/log(1+τ_j)|, τ the rank by βr.

    R are the scores, r the log-ratios of the responses, and τ_i is the rank of response i by βr. LiPO-λ, eq. 8: a pair
    counts more if swapping it would change the DCG of the policy's ranking more. Δ is not differentiated. For equal
    rewards, as all are before the first step, Δ is averaged over their possible orders.
    Scores are gains in [0, 1]; the trainer rejects data with scores outside this range.

    Use it on lists of four or more scored responses, if the top of the ranking matters most.

    Args:
        policy_list_logps, ref_list_logps, list_scores: `[B, K]`; sums in nats. list_mask: `[B, K]` bool.
        beta: > 0.
        normalize_scores: rescales each list's scores to [0, 1] first.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    check_positive(beta=beta)
    rewards = list_rewards(policy_list_logps, ref_list_logps, list_mask, beta, list_scores=list_scores)
    scores = _stretched(list_scores, list_mask) if normalize_scores else list_scores
    better = (scores[:, :, None] > scores[:, None, :]) & list_mask[:, :, None] & list_mask[:, None, :]
    discounts_apart = _discounts_apart(rewards.detach().masked_fill(~list_mask, -torch.inf))
    weights = _differences(torch.exp2(scores)).abs() * discounts_apart * better
    losses = -F.logsigmoid(_differences(rewards)) * weights.to(rewards.dtype)
    return LossOutput(losses.sum((1, 2)), rewards.detach())


def _discounts_apart(rewards: Tensor) -> Tensor:
    """Return `[B, K, K]`: the mean of |1/log(1+τ_i) − 1/log(1+τ_j)| over all rankings τ by reward, largest first.

    n equal rewards share n ranks. Over all rankings, each of these rewards has each of the n ranks equally often, and
    each two rewards have each pair of ranks equally often.
    """
    place = torch.arange(1, rewards.shape[1] + 1, device=rewards.device, dtype=rewards.dtype)
    discounts = 1 / torch.log1p(place)
    equal = rewards[:, :, None] == rewards[:, None, :]
    ahead, count = (rewards[:, :, None] < rewards[:, None, :]).sum(2), equal.sum(2)
    # [b, i, p]: the fraction of rankings in which response i has rank p.
    at_place = (place > ahead[..., None]) & (place <= (ahead + count)[..., None])
    shares = at_place.to(rewards.dtype) / count[..., None]
    means = shares @ discounts
    among_equal = torch.einsum("bip,bjq,pq->bij", shares, shares, (discounts[:, None] - discounts).abs())
    # Two responses never share a rank.
    among_equal = among_equal * count[..., None] / (count[..., None] - 1).clamp(min=1)
    return torch.where(equal, among_equal, (means[:, :, None] - means[:, None, :]).abs())


def _differences(values: Tensor) -> Tensor:
    """Return `[B, K, K]`: value i minus value j."""
    return values[:, :, None] - values[:, None, :]


def _stretched(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the scores of each list, shifted and scaled to [0, 1]; if all are equal, they become 0."""
    low = scores.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    return torch.where(mask, (scores - low) / torch.where(high > low, high - low, 1.0), 0.0)
