"""Losses that compare each pair's margin with the margins of earlier batches: β-DPO and α-DPO.

Both losses keep two exponential moving averages, μ and σ, as the authors' code does. μ averages the mean margin of each
global batch, and σ the standard deviation of its margins. The momentum is 0.9, and both averages start at 0. Each
training batch updates the averages before its loss is computed; evaluation does not change them. The standard deviation
of a batch of B pairs has the divisor B − 1, and is 0 for a single pair.
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
# Smaller values of σ are raised to this value. They occur if all margins are equal, as before the first step, when the
# policy equals the reference.
SMALLEST_STD = 1e-8
SMALLEST_BETA = 1e-3


def _spread(margins: Tensor) -> Tensor:
    """Return the sample standard deviation of the margins; 0 for a single margin."""
    return (margins - margins.mean()).square().sum().div(max(1, len(margins) - 1)).sqrt()


def _moved(state: State, margins: Tensor) -> State:
    """Return the state after one more batch: μ and σ updated with its margins, and the number of batches so far."""
    return {
        "mean": MOMENTUM * state["mean"] + (1 - MOMENTUM) * margins.mean(),
        "std": MOMENTUM * state["std"] + (1 - MOMENTUM) * _spread(margins),
        "batches": state["batches"] + 1,
    }


def _alone(margins: Tensor) -> State:
    """Return the mean and the standard deviation of this batch's margins, to be used as μ and σ without a state."""
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

    Here, h = r_w − r_l is a pair's margin, r a response's log-ratio of policy to reference, and ℓ(z) = log(1 + e^(−z)).
    μ is the moving average of the margins' mean, and σ that of their standard deviation. sg stops the gradient.

    β-DPO increases β for batches with large margins, because such pairs are less informative. It also leaves out
    outliers: of B pairs, it keeps int(B(1 − ρ)), and at least one. The kept pairs are drawn without replacement, with
    weights exp(−½((h − μ)/σ)²). h̄_kept is the mean h of the kept pairs. The loss of a kept pair is ℓ(β_b h) times B,
    divided by the number of kept pairs; the loss of every other pair is 0. The mean over the batch is therefore the
    mean over the kept pairs. The implicit reward of every response is βr.

    The draw depends only on the number of batches so far and on the pairs' positions in their dataset. It is therefore
    the same on every rank, for every batch split, and after resuming. Evaluation keeps all pairs, so that metrics cover
    all rows. β_b then uses the mean h of the evaluated batch, and μ from training.

    Use it on data of mixed quality, with batches of 32 pairs or more, so that the mean and the standard deviation are
    meaningful.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs
            (nats) of the B pairs in the global batch.
        rows, pair_in_row: `[B]` int64. The index of the pair's row in its dataset, and the pair's index among the pairs
            of that row.
        beta: > 0. a: ≥ 0, per nat. rho: ρ in [0, 1), the fraction of pairs left out.
        state: μ (`mean`), σ (`std`) and the number of batches so far (`batches`). If it is `None`, the mean and the
            standard deviation of this batch replace μ and σ.
        training: if False, all pairs are kept.

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
    """Draw `count` examples without replacement, and return `[B]` bool, True for the drawn examples.

    The probabilities are proportional to the exponentials of `log_weights`. The draw adds Gumbel noise to the
    log-weights and takes the largest sums (Efraimidis and Spirakis 2006). `keys` are integers `[B]` or scalars that
    determine the noise.
    """
    noise = -(-_uniform(keys).to(log_weights.dtype).log()).log()
    chosen = (log_weights + noise).topk(count).indices
    return torch.zeros_like(log_weights, dtype=torch.bool).scatter(0, chosen, True)


def _uniform(keys: tuple[Tensor, ...]) -> Tensor:
    """Return pseudo-random numbers in (0, 1), `[B]` fp32, which are hashes of the integer keys.

    The hash is that of SplitMix64 (Steele et al. 2014). It runs on the keys' device, and needs no random generator,
    whose state would have to be the same on all ranks. The result uses 23 of the hash's 64 bits: such an integer plus ½
    is exact in fp32, and divided by 2²³ it is below 1.
    """
    mixed = torch.zeros_like(keys[-1])
    for key in keys:
        mixed = mixed + key.to(torch.int64) - 0x61C8864680B583EB
        mixed = (mixed ^ _shifted(mixed, 30)) * -0x40A7B892E31B1A47
        mixed = (mixed ^ _shifted(mixed, 27)) * -0x6B2FB644ECCEEE15
        mixed = mixed ^ _shifted(mixed, 31)
    return (_shifted(mixed, 41).float() + 0.5) / 2**23


def _shifted(values: Tensor, places: int) -> Tensor:
    """Shift to the right and fill with zeros from the left, as for unsigned integers."""
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

    Here, s̄ is a response's mean log-prob per token under the policy, r̄ its log-ratio to the reference per token, and
    ℓ(x) = log(1 + e^(−x)). In each batch, r̄_w − r̄_l has a mean and a standard deviation over the pairs. μ is the
    moving average of the means, and σ that of the standard deviations. sg stops the gradient.

    α-DPO gives a larger target margin to pairs whose r̄_w − r̄_l is larger than in other pairs. Set the part of the
    margin that all pairs share either as γ or as γ/β (default 0.4). The paper uses α = 0.05 for Gemma-2 and Mistral;
    the default is 0.2. The implicit reward is β·s̄, and the component `target` is γ/β + αz.

    Use it where SimPO works, a reference model is available, and the pairs differ widely in difficulty.

    Args:
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps: `[B]`. Summed log-probs
            (nats) of the B pairs in the global batch.
        chosen_lengths, rejected_lengths: `[B]`. Numbers of scored tokens.
        beta: > 0. gamma: ≥ 0, in reward units. gamma_beta_ratio: ≥ 0, nats per token. alpha: ≥ 0, nats per token.
        state: μ (`mean`) and σ (`std`). If it is `None`, the mean and the standard deviation of this batch replace
            them.

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
