"""DPO on sampled or weighted tokens: SamPO, D²PO and TIS-DPO.

All three are ℓ(u_w − u_l), where ℓ(z) = −log σ(z), and u = β Σ_t m_t ρ_t is the implicit reward of a response.
ρ_t = log π(y_t) − log π_ref(y_t) (nats) is the log-ratio of its scored token t. The methods differ in the weights m_t;
with m_t = 1, each of them is DPO. Tensors of tokens are `[B, T]`, padded with 0, where T is the length of the longest
response.
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

    h is the summed log-ratio log(π/π_ref) of the chosen response y_w, minus that of the rejected response y_l, and
    ℓ(z) = −log σ(z). SamPO uses all tokens of the shorter response, and draws the same number of tokens uniformly from
    the longer one. The subset depends only on the pair's position in its dataset, the epoch and `seed`. It is therefore
    the same on every rank, for every batch split and after resuming, and it differs between epochs. The authors' code
    draws a new subset whenever it sees the pair. All evaluations use the subsets of the first epoch.

    Use it if DPO makes responses longer, and the scale of the rewards must not change (as it does with `dpo_norm`).

    Args:
        policy_chosen_token_logps, policy_rejected_token_logps, ref_chosen_token_logps, ref_rejected_token_logps:
            `[B, T]`. Log-probs of the scored tokens (nats), padded with 0.
        chosen_lengths, rejected_lengths: `[B]`. Numbers of scored tokens.
        rows, pair_in_row: `[B]`. The index of the pair's row in its dataset, and the pair's index among the pairs of
            that row.
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

    D²PO, DPO with temporal decay. ρ_w,t and ρ_l,t are the log-ratios log(π/π_ref) of scored token t in the chosen and
    in the rejected response, and ℓ(z) = −log σ(z). t counts the scored tokens from 1, as in the authors' code. γ = 1
    gives DPO.

    Use it if responses drift after a good or bad start, so that late tokens carry little information.

    Args:
        policy_chosen_token_logps, policy_rejected_token_logps, ref_chosen_token_logps, ref_rejected_token_logps:
            `[B, T]`. Log-probs of the scored tokens (nats), padded with 0.
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
    """Return the weights γ, γ², …, γ^T, `[T]`. They are computed as exp(t log γ), so rounding errors do not add up."""
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

    ρ_w,t and ρ_l,t are the log-ratios log(π/π_ref) of scored token t in the chosen and in the rejected response. w_t is
    the weight of this token, and ℓ(z) = −log σ(z). Token-level importance sampling DPO compares these weighted sums,
    which the paper calls u. The paper's derivation also subtracts η, a weighted KL of the sequences, which this loss
    omits. The weights come from the dataset; the paper estimates them with a contrastive pair of models. Weights of 1
    give DPO.

    Use it if you know which tokens matter, for example from contrastive models, span annotations or a verifier.

    Args:
        policy_chosen_token_logps, policy_rejected_token_logps, ref_chosen_token_logps, ref_rejected_token_logps:
            `[B, T]`. Log-probs of the scored tokens (nats), padded with 0.
        chosen_token_weights, rejected_token_weights: `[B, T]`. Weights ≥ 0.
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
    """Return the token log-ratios (ρ_w, ρ_l) of chosen and rejected responses, each `[B, T]`.

    Raises:
        ValueError: shapes differ.
    """
    check_tokens({"policy_chosen_token_logps": policy_chosen, "ref_chosen_token_logps": ref_chosen}, vectors)
    check_tokens({"policy_rejected_token_logps": policy_rejected, "ref_rejected_token_logps": ref_rejected}, vectors)
    return policy_chosen - ref_chosen, policy_rejected - ref_rejected


def _dpo_of_tokens(chosen: Tensor, rejected: Tensor, beta: float) -> LossOutput:
    """Return DPO's loss and rewards for token log-ratios `[B, T]` that are already multiplied by their weights."""
    chosen, rejected = beta * chosen.sum(-1), beta * rejected.sum(-1)
    return LossOutput(logistic(chosen - rejected), pair_rewards(chosen, rejected))


def _subset(lengths: Tensor, count: Tensor, keys: Tensor, width: int) -> Tensor:
    """Draw `count` tokens of each response without replacement, and return `[B, width]` bool, True for drawn tokens.

    Args:
        lengths: `[B]`. Numbers of scored tokens.
        count: `[B]`. Numbers of tokens to draw.
        keys: `[B]`. An integer for each response, which makes the draw reproducible.
        width: the length of the longest response.
    """
    places = torch.arange(width, device=lengths.device)
    draws = _mixed(keys[:, None] + places).masked_fill(places >= lengths[:, None], _WORD + 1)
    return draws.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]


_WORD = 0xFFFFFFFF


def _mixed(numbers: Tensor) -> Tensor:
    """Return 32-bit hashes of integers as int64, with the hash function "lowbias32" (xor, shift and multiply).

    A hash is used instead of a random generator, whose numbers would depend on the device and on earlier draws.
    """
    x = numbers.long() & _WORD
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & _WORD
    return x ^ (x >> 16)
