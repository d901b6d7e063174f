"""DPO on chosen tokens or weighted ones: SamPO, D²PO and TIS-DPO, each ℓ(β(Σ_t m_t ρ_t of y_w − the same of y_l)).

ρ_t = log π(y_t) − log π_ref(y_t) (nats) is the log-ratio of a scored token, `[B, T]` and 0 behind a response's end.
What the methods differ in is m_t; with m_t = 1 each is DPO. The implicit reward is the weighted sum, β Σ_t m_t ρ_t.
"""

import math

import torch
from torch import Tensor

from hf_prefopt.losses.base import LossOutput, check_positive, check_range, check_tokens, logistic, pair_rewards
from hf_prefopt.losses.registry import register_loss


@register_loss("sampo", paper="2406.10957")
def sampo_loss(
    policy_chosen_token_logps: Tensor,
    policy_rejected_token_logps: Tensor,
    ref_chosen_token_logps: Tensor,
    ref_rejected_token_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    rows: Tensor,
    pair_in_row: Tensor,
    beta: float = 0.1,
    seed: int = 0,
    epoch: int = 0,
) -> LossOutput:
    """ℓ(βh) over a random subset of min(|y_w|, |y_l|) tokens of each side: no reward for length as such.

    SamPO: of the longer response as many tokens count as the shorter one has, each as likely as the next. The
    subset is a function of the pair's place in its data set, of the epoch and of `seed`: the same on every rank, in
    every cut into micro-batches and after a resume, and another one in each epoch, as in the authors' code, which draws
    whenever it sees the pair. Evaluations all have the subsets of the first epoch.

    Use it where DPO makes responses longer, and `dpo_norm`'s mean would change the scale of the rewards.

    Args:
        policy_chosen_token_logps, policy_rejected_token_logps, ref_chosen_token_logps, ref_rejected_token_logps:
            `[B, T]`, nats, 0 behind the end of a response.
        chosen_lengths, rejected_lengths, rows, pair_in_row: `[B]`, whole numbers.
        beta: > 0. seed: of the subsets, a whole number. epoch: the number of the epoch, from 0.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    check_positive(beta=beta)
    chosen, rejected = _token_log_ratios(
        policy_chosen_token_logps,
        policy_rejected_token_logps,
        ref_chosen_token_logps,
        ref_rejected_token_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        rows=rows,
        pair_in_row=pair_in_row,
    )
    shorter = torch.minimum(chosen_lengths, rejected_lengths)
    draw = (seed * 0x9E3779B9 + epoch * 0x85EBCA6B) & _WORD
    pair = _mixed(_mixed(rows + draw) + pair_in_row)
    chosen_subset = _subset(chosen_lengths, shorter, _mixed(pair), chosen.shape[1])
    rejected_subset = _subset(rejected_lengths, shorter, _mixed(pair + 1), rejected.shape[1])
    return _dpo_of_tokens(chosen * chosen_subset, rejected * rejected_subset, beta)


@register_loss("d2po", paper="2502.14340")
def d2po_loss(
    policy_chosen_token_logps: Tensor,
    policy_rejected_token_logps: Tensor,
    ref_chosen_token_logps: Tensor,
    ref_rejected_token_logps: Tensor,
    beta: float = 0.1,
    gamma: float = 0.98,
) -> LossOutput:
    """ℓ(β Σ_t γ^t(ρ_w,t − ρ_l,t)), t from 1: earlier tokens count more.

    D²PO, DPO with temporal decay; t counts the scored tokens, and begins at 1 as in the authors' code. γ = 1 is DPO.

    Use it where responses drift after a good or bad start, so that late tokens say little about the preference.

    Args:
        policy_chosen_token_logps, policy_rejected_token_logps, ref_chosen_token_logps, ref_rejected_token_logps:
            `[B, T]`, nats, 0 behind the end of a response.
        beta: > 0. gamma: γ in (0, 1].

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_positive(beta=beta)
    check_range("gamma", gamma, 0.0, 1.0, open_low=True, closed_high=True)
    chosen, rejected = _token_log_ratios(
        policy_chosen_token_logps, policy_rejected_token_logps, ref_chosen_token_logps, ref_rejected_token_logps
    )
    return _dpo_of_tokens(chosen * _decay(chosen, gamma), rejected * _decay(rejected, gamma), beta)


def _decay(ratio: Tensor, gamma: float) -> Tensor:
    """γ, γ², … `[T]`, through the logarithm, which is rounded once and not with every power."""
    places = torch.arange(1, ratio.shape[1] + 1, dtype=ratio.dtype, device=ratio.device)
    return torch.exp(math.log(gamma) * places)


@register_loss("tis_dpo", aliases=("tisdpo",), paper="2410.04350")
def tis_dpo_loss(
    policy_chosen_token_logps: Tensor,
    policy_rejected_token_logps: Tensor,
    ref_chosen_token_logps: Tensor,
    ref_rejected_token_logps: Tensor,
    chosen_token_weights: Tensor,
    rejected_token_weights: Tensor,
    beta: float = 0.1,
) -> LossOutput:
    """ℓ(β(Σ_t w_t ρ_w,t − Σ_t w_t ρ_l,t)), w from the columns `chosen_token_weights` and `rejected_token_weights`.

    Token-level importance sampling DPO, its weighted sequence log-ratios u; the weighted sequence KL η
    that its derivation also takes off is left out. How the weights are estimated (from a contrastive pair of models in
    the paper) is the data's affair; weights of 1 are DPO.

    Use it where something says which tokens matter: contrastive models, span annotations, a verifier.

    Args:
        policy_chosen_token_logps, policy_rejected_token_logps, ref_chosen_token_logps, ref_rejected_token_logps:
            `[B, T]`, nats, 0 behind the end of a response.
        chosen_token_weights, rejected_token_weights: `[B, T]`, ≥ 0.
        beta: > 0.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    check_positive(beta=beta)
    check_tokens({"logps": policy_chosen_token_logps, "weights": chosen_token_weights}, {})
    check_tokens({"logps": policy_rejected_token_logps, "weights": rejected_token_weights}, {})
    chosen, rejected = _token_log_ratios(
        policy_chosen_token_logps, policy_rejected_token_logps, ref_chosen_token_logps, ref_rejected_token_logps
    )
    return _dpo_of_tokens(chosen * chosen_token_weights, rejected * rejected_token_weights, beta)


def _token_log_ratios(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, **vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """(ρ_w, ρ_l), each `[B, T]`. Raises `ValueError` where shapes differ."""
    check_tokens({"policy_chosen_token_logps": policy_chosen, "ref_chosen_token_logps": ref_chosen}, vectors)
    check_tokens({"policy_rejected_token_logps": policy_rejected, "ref_rejected_token_logps": ref_rejected}, vectors)
    return policy_chosen - ref_chosen, policy_rejected - ref_rejected


def _dpo_of_tokens(chosen: Tensor, rejected: Tensor, beta: float) -> LossOutput:
    """ℓ of the difference of the two sums over tokens, β times."""
    chosen, rejected = beta * chosen.sum(-1), beta * rejected.sum(-1)
    return LossOutput(logistic(chosen - rejected), pair_rewards(chosen, rejected))


def _subset(lengths: Tensor, count: Tensor, keys: Tensor, width: int) -> Tensor:
    """`[B, width]` bool: `count` of each response's tokens, drawn without replacement by its key."""
    places = torch.arange(width, device=lengths.device)
    draws = _mixed(keys[:, None] + places).masked_fill(places >= lengths[:, None], _WORD + 1)
    return draws.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]


_WORD = 0xFFFFFFFF


def _mixed(numbers: Tensor) -> Tensor:
    """A 32-bit hash of whole numbers (xor, shift and multiply, with the constants of "lowbias32"), in int64.

    No generator is used, because its draws would depend on how many were made before, and on the device.
    """
    x = numbers.long() & _WORD
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & _WORD
    return x ^ (x >> 16)
