"""DPO on sampled or weighted tokens: SamPO, D²PO and TIS-DPO, each ℓ(β(Σ_t m_t ρ_t of y_w − Σ_t m_t ρ_t of y_l)).

ρ_t = log π(y_t) − log π_ref(y_t) (nats) is the log-ratio of a scored token, `[B, T]`, padded with 0. The methods differ
in m_t; with m_t = 1 each is DPO. The implicit reward is the weighted sum, β Σ_t m_t ρ_t.
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
    """ℓ(βh) over a random subset of min(|y_w|, |y_l|) tokens of each response: length alone is not rewarded.

    SamPO uses as many tokens of the longer response as the shorter one has, drawn uniformly. The subset depends only on
    the pair's position in its dataset, the epoch and `seed`: it is the same on every rank, for every batch split and
    after resuming, and differs between epochs. The authors' code draws a new subset whenever it sees the pair. All
    evaluations use the subsets of the first epoch.

    Use it if DPO makes responses longer, and the scale of the rewards must not change (as it does with `dpo_norm`).

    Args:
        policy_chosen_token_logps, policy_rejected_token_logps, ref_chosen_token_logps, ref_rejected_token_logps:
            `[B, T]`, nats, padded with 0.
        chosen_lengths, rejected_lengths, rows, pair_in_row: `[B]`, integers.
        beta: > 0. seed: an integer, the seed of the subsets. epoch: the number of the epoch, from 0.

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

    D²PO, DPO with temporal decay. t counts the scored tokens from 1, as in the authors' code. γ = 1 gives DPO.

    Use it if responses drift after a good or bad start, so that late tokens carry little information.

    Args:
        policy_chosen_token_logps, policy_rejected_token_logps, ref_chosen_token_logps, ref_rejected_token_logps:
            `[B, T]`, nats, padded with 0.
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
    """Return γ, γ², … `[T]`, computed as exp(t log γ), so that rounding errors do not accumulate."""
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

    Token-level importance sampling DPO uses the weighted sequence log-ratios u. It omits the weighted sequence KL η,
    which the paper's derivation also subtracts. The weights come from the dataset; the paper estimates them with a
    contrastive pair of models. Weights of 1 give DPO.

    Use it if you know which tokens matter, for example from contrastive models, span annotations or a verifier.

    Args:
        policy_chosen_token_logps, policy_rejected_token_logps, ref_chosen_token_logps, ref_rejected_token_logps:
            `[B, T]`, nats, padded with 0.
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
    """Return (ρ_w, ρ_l), each `[B, T]`. Raises `ValueError` if shapes differ."""
    check_tokens({"policy_chosen_token_logps": policy_chosen, "ref_chosen_token_logps": ref_chosen}, vectors)
    check_tokens({"policy_rejected_token_logps": policy_rejected, "ref_rejected_token_logps": ref_rejected}, vectors)
    return policy_chosen - ref_chosen, policy_rejected - ref_rejected


def _dpo_of_tokens(chosen: Tensor, rejected: Tensor, beta: float) -> LossOutput:
    """Return ℓ(β(Σ_t ρ_w,t − Σ_t ρ_l,t)) and the rewards βΣ_t ρ_t, for log-ratios ρ that are already weighted."""
    chosen, rejected = beta * chosen.sum(-1), beta * rejected.sum(-1)
    return LossOutput(logistic(chosen - rejected), pair_rewards(chosen, rejected))


def _subset(lengths: Tensor, count: Tensor, keys: Tensor, width: int) -> Tensor:
    """Return `[B, width]` bool: `count` tokens of each response, drawn without replacement by a hash of its key."""
    places = torch.arange(width, device=lengths.device)
    draws = _mixed(keys[:, None] + places).masked_fill(places >= lengths[:, None], _WORD + 1)
    return draws.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]


_WORD = 0xFFFFFFFF


def _mixed(numbers: Tensor) -> Tensor:
    """Return a 32-bit hash of integers (xor, shift and multiply, with the constants of "lowbias32"), in int64.

    The draws of a random generator would depend on the device and on the number of earlier draws.
    """
    x = numbers.long() & _WORD
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & _WORD
    return x ^ (x >> 16)
