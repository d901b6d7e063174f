"""Losses that compare each pair's margin with the margins of earlier batches: β-DPO and α-DPO.

Both losses keep exponential moving averages of the mean μ and the standard deviation σ of the margins in the global
batch, as the authors' code does. The momentum is 0.9, and both averages start at 0. Each training batch updates the
averages before its loss is computed; evaluation does not change them. σ is the sample standard deviation (with the
divisor B − 1), and 0 for a single pair.
"""

import torch
from torch import Tensor

from hf_prefopt.losses.base import (
    LossOutput,
    check_positive,
    check_range,
    check_same_shape,
    logistic,
    of_log_ratios,
    pair_rewards,
    per_token,
)
from hf_prefopt.losses.registry import RunningState, register_loss
from hf_prefopt.losses.simpo import target_margin

State = dict[str, Tensor]
MOMENTUM = 0.9
# A smaller σ means that all margins are equal, as before the first step, when the policy is the reference.
SMALLEST_STD = 1e-8
SMALLEST_BETA = 1e-3


def _spread(margins: Tensor) -> Tensor:
    """Return σ, the sample standard deviation of the margins; 0 for a single margin."""
    return (margins - margins.mean()).square().sum().div(max(1, len(margins) - 1)).sqrt()


def _moved(state: State, margins: Tensor) -> State:
    """Return μ and σ, updated with the margins of a batch, and the number of batches so far."""
    return {
        "mean": MOMENTUM * state["mean"] + (1 - MOMENTUM) * margins.mean(),
        "std": MOMENTUM * state["std"] + (1 - MOMENTUM) * _spread(margins),
        "batches": state["batches"] + 1,
    }


def _alone(margins: Tensor) -> State:
    """Return μ and σ of a single batch."""
    return {"mean": margins.mean(), "std": _spread(margins), "batches": torch.zeros_like(margins[0])}


def _standardized(margins: Tensor, state: State) -> Tensor:
    return (margins - state["mean"]) / state["std"].clamp(min=SMALLEST_STD)


def _update_beta_dpo(
    state: State,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    **_,
) -> State:
    return _moved(state, policy_chosen_logps - ref_chosen_logps - policy_rejected_logps + ref_rejected_logps)


_START = {"mean": 0.0, "std": 0.0, "batches": 0.0}


@register_loss("beta_dpo", paper="2407.08639", needs_global_batch=True, state=RunningState(_START, _update_beta_dpo))
@of_log_ratios()
def beta_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    rows: Tensor,
    pair_in_row: Tensor,
    beta: float = 0.1,
    a: float = 0.6,
    rho: float = 0.2,
    state: State | None = None,
    training: bool = True,
) -> LossOutput:
    """ℓ(β_b h) of the kept pairs, β_b = sg max(10⁻³, β(1 + a(h̄_kept − μ))): β adapts to the batch.

    β-DPO increases β for batches with large margins, because such pairs are less informative, and leaves out outliers.
    Of B pairs, β-DPO keeps int(B(1 − ρ)), and at least one. The kept pairs are drawn without replacement, with weights
    exp(−½((h − μ)/σ)²), where μ and σ are the moving averages. h̄_kept is the mean h of the kept pairs. The loss of a
    kept pair is its ℓ times B divided by the number of kept pairs; the loss of every other pair is 0. The mean over the
    batch is therefore the mean over the kept pairs. The implicit reward of every pair is βr. The draw depends only on
    the number of batches so far and on the pairs' positions in their dataset, so it is the same on every rank, for
    every batch split, and after resuming. Evaluation keeps all pairs, so that metrics cover all rows; β_b then uses the
    mean h of the evaluated batch, and μ from training.

    Use it on data of mixed quality, with batches of 32 pairs or more, so that the mean and the standard deviation are
    meaningful.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`, summed, nats, of
            the global batch.
        rows, pair_in_row: `[B]` int64, the pair's row in its dataset and its index among that row's pairs.
        beta: > 0. a: ≥ 0, per nat. rho: ρ in [0, 1), the fraction of pairs left out.
        state: μ (`mean`), σ (`std`) and `batches`; `None` uses the statistics of this batch alone.
        training: False keeps all pairs.

    Raises:
        ValueError: shapes differ or a hyperparameter is out of range.
    """
    check_range("a", a, 0.0)
    check_range("rho", rho, 0.0, 1.0)
    margins = chosen - rejected
    known = _alone(margins.detach()) if state is None else state
    count = max(1, int(len(margins) * (1 - rho))) if training else len(margins)
    log_weights = -_standardized(margins.detach(), known).square() / 2
    kept = _draw(log_weights, count, (known["batches"], rows, pair_in_row))
    mean_kept = (margins.detach() * kept).sum() / count
    beta_used = (beta * (1 + a * (mean_kept - known["mean"]))).clamp(min=SMALLEST_BETA)
    return LossOutput(
        logistic(beta_used * margins) * kept * (len(margins) / count),
        pair_rewards(beta * chosen, beta * rejected),
        {"beta": beta_used.expand_as(margins), "kept": kept.to(margins.dtype)},
    )


def _draw(log_weights: Tensor, count: int, keys: tuple[Tensor, ...]) -> Tensor:
    """Return `[B]` bool, True for `count` examples, drawn one after the other without replacement.

    The draw uses the given weights: it adds Gumbel noise to the log-weights and takes the largest sums (Efraimidis and
    Spirakis 2006).
    """
    noise = -(-_uniform(keys).to(log_weights.dtype).log()).log()
    chosen = (log_weights + noise).topk(count).indices
    return torch.zeros_like(log_weights, dtype=torch.bool).scatter(0, chosen, True)


def _uniform(keys: tuple[Tensor, ...]) -> Tensor:
    """Return `[B]` fp32 in (0, 1): a hash of the integer keys, mixed as in SplitMix64 (Steele et al. 2014).

    The hash runs on the device and needs no generator state, which would have to be synchronized across ranks. The
    result uses 23 of the 64 bits, because 23 bits plus one half are exact in fp32 and never reach 1.
    """
    mixed = torch.zeros_like(keys[-1])
    for key in keys:
        mixed = mixed + key.to(torch.int64) - 0x61C8864680B583EB
        mixed = (mixed ^ _shifted(mixed, 30)) * -0x40A7B892E31B1A47
        mixed = (mixed ^ _shifted(mixed, 27)) * -0x6B2FB644ECCEEE15
        mixed = mixed ^ _shifted(mixed, 31)
    return (_shifted(mixed, 41).float() + 0.5) / 2**23


def _shifted(values: Tensor, places: int) -> Tensor:
    """Return the logical right shift: zeros enter from the left, as for unsigned numbers."""
    return (values >> places) & ((1 << (64 - places)) - 1)


def _update_alpha_dpo(
    state: State,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    **_,
) -> State:
    chosen = per_token(policy_chosen_logps - ref_chosen_logps, chosen_lengths)
    return _moved(state, chosen - per_token(policy_rejected_logps - ref_rejected_logps, rejected_lengths))


@register_loss(
    "alpha_dpo",
    paper="2410.10148",
    is_average_loss=True,
    needs_global_batch=True,
    state=RunningState(_START, _update_alpha_dpo),
)
def alpha_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 10.0,
    gamma: float | None = None,
    gamma_beta_ratio: float | None = None,
    alpha: float = 0.2,
    state: State | None = None,
) -> LossOutput:
    """ℓ(β[s̄_w − s̄_l − sg(γ/β + αz)]), z = (r̄_w − r̄_l − μ)/σ: SimPO with a target margin for each pair.

    α-DPO gives a larger target to pairs whose margin over the reference is larger than that of other pairs. μ and σ are
    moving averages over r̄_w − r̄_l. Set the margin either as γ or as γ/β (default 0.4). The paper uses α = 0.05 for
    Gemma-2 and Mistral; the default is 0.2. The implicit reward is β·s̄, and the component `target` is γ/β + αz.

    Use it where SimPO works, a reference model is available, and the pairs differ widely in difficulty.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`, summed, nats, of
            the global batch; lengths: `[B]`, tokens.
        beta: > 0. gamma: ≥ 0, in reward units. gamma_beta_ratio: ≥ 0, nats per token. alpha: ≥ 0, nats per token.
        state: μ (`mean`) and σ (`std`); `None` uses the statistics of this batch alone.

    Raises:
        ValueError: both gamma and gamma_beta_ratio are given, shapes differ, or a value is out of range.
    """
    check_positive(beta=beta)
    check_range("alpha", alpha, 0.0)
    gamma = target_margin(beta, gamma, gamma_beta_ratio, default_ratio=0.4)
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    chosen, rejected = (
        per_token(policy_chosen_logps, chosen_lengths),
        per_token(policy_rejected_logps, rejected_lengths),
    )
    ref_margins = per_token(ref_chosen_logps, chosen_lengths) - per_token(ref_rejected_logps, rejected_lengths)
    excess = (chosen - rejected - ref_margins).detach()
    known = _alone(excess) if state is None else state
    target = gamma / beta + alpha * _standardized(excess, known)
    return LossOutput(
        logistic(beta * (chosen - rejected - target)),
        pair_rewards(beta * chosen, beta * rejected),
        {"target": target},
    )
