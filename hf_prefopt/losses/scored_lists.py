"""Losses of lists whose responses have scores R: InfoNCA, NCA, EXO, and LiPO's lambda loss. Larger scores are better.

Tensors are `[B, K]`, for B lists of up to K responses. Entries where `list_mask` is False are padding and are ignored.
r is the log-ratio of policy to reference, summed over a response (nats). p = softmax(R / T) over the responses of a
list, where T is a temperature, the hyperparameter α or τ.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prefopt.losses.base import LossOutput, UnsuitableExamples, check_positive
from hf_prefopt.losses.lists import list_rewards
from hf_prefopt.losses.registry import register_loss


def _targets(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the softmax over the responses of each list, with 0 for padding."""
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=1)


def _log_softmax(rewards: Tensor, mask: Tensor) -> Tensor:
    """Return the log-softmax over the responses of each list, with 0 for padding."""
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

    InfoNCA. r is a response's log-ratio of policy to reference, and R its score. Both softmaxes are over the responses
    of a list. With the default α, which is that of the authors' code, nearly all of p is on the best response.

    Use it on lists of two or more scored responses to a prompt.

    Args:
        policy_list_logps, ref_list_logps: `[B, K]`. Summed log-probs (nats). list_scores: `[B, K]`. Scores R.
        list_mask: `[B, K]` bool. False for padding.
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

    Noise contrastive alignment. K is the number of responses in the list. The other symbols and the arguments are those
    of `infonca_loss`.

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

    Efficient exact optimization with rewards. r is a response's log-ratio of policy to reference, and R its score. Both
    softmaxes are over the responses of a list.

    Use it on lists with reward-model scores if the policy should be mode-seeking (reverse KL). `infonca` is
    mode-covering.

    Args:
        policy_list_logps, ref_list_logps: `[B, K]`. Summed log-probs (nats). list_scores: `[B, K]`. Scores R.
        list_mask: `[B, K]` bool. False for padding.
        beta: > 0. tau: τ > 0, in the unit of the scores.

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_positive(beta=beta, tau=tau)
    rewards = list_rewards(policy_list_logps, ref_list_logps, list_mask, beta, list_scores=list_scores)
    policy, data = (_log_softmax(values, list_mask) for values in (rewards, list_scores / tau))
    return LossOutput((policy.exp() * (policy - data) * list_mask).sum(1), rewards.detach())


def _check_gains(list_scores: Tensor, list_mask: Tensor, normalize_scores: bool) -> None:
    """Check that scores are in [0, 1], as the loss requires, unless `normalize_scores` rescales them."""
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

    LiPO-λ, eq. 8. R_i is the score of response i, r_i its log-ratio of policy to reference, and ℓ(z) = −log σ(z). τ_i
    is the rank of response i if the list is sorted by βr, the largest first. Two responses count more if swapping their
    ranks would change the DCG (discounted cumulative gain) of this ranking more. Δ has no gradient. If rewards βr are
    equal, as all are before the first step, Δ is averaged over the possible orders of the responses. Scores must be in
    [0, 1]; the trainer rejects other scores.

    Use it on lists of four or more scored responses, if the top of the ranking matters most.

    Args:
        policy_list_logps, ref_list_logps: `[B, K]`. Summed log-probs (nats). list_scores: `[B, K]`. Scores R.
        list_mask: `[B, K]` bool. False for padding.
        beta: > 0.
        normalize_scores: whether to rescale the scores of each list to [0, 1] first.

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
    """Return `[B, K, K]`. Entry [b, i, j] is the mean of |1/log(1+τ_i) − 1/log(1+τ_j)| over all rankings τ by reward.

    A ranking gives rank 1 to the largest reward. If n responses have equal rewards, they share n ranks, and there are
    several rankings. Over all of them, each of these responses has each of the n ranks equally often, and any two of
    them have each pair of ranks equally often.
    """
    place = torch.arange(1, rewards.shape[1] + 1, device=rewards.device, dtype=rewards.dtype)
    discounts = 1 / torch.log1p(place)
    equal = rewards[:, :, None] == rewards[:, None, :]
    ahead, count = (rewards[:, :, None] < rewards[:, None, :]).sum(2), equal.sum(2)
    # Entry [b, i, p] of `shares` is the fraction of rankings in which response i has rank p + 1.
    at_place = (place > ahead[..., None]) & (place <= (ahead + count)[..., None])
    shares = at_place.to(rewards.dtype) / count[..., None]
    means = shares @ discounts
    among_equal = torch.einsum("bip,bjq,pq->bij", shares, shares, (discounts[:, None] - discounts).abs())
    # The product of two fractions also counts the case that both responses have the same rank, which cannot occur.
    among_equal = among_equal * count[..., None] / (count[..., None] - 1).clamp(min=1)
    return torch.where(equal, among_equal, (means[:, :, None] - means[:, None, :]).abs())


def _differences(values: Tensor) -> Tensor:
    """Return `[B, K, K]`. Entry [b, i, j] is value i minus value j of list b."""
    return values[:, :, None] - values[:, None, :]


def _stretched(scores: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale the scores of each list to [0, 1]. If all scores of a list are equal, they become 0."""
    low = scores.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    return torch.where(mask, (scores - low) / torch.where(high > low, high - low, 1.0), 0.0)
