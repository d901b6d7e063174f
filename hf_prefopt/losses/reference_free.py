"""Losses without a reference that contain the NLL of the chosen responses: CPO, ORPO, SLiC-HF, and the NLL alone.

s is a response's summed log-prob (nats) under the policy, and s̄ is s divided by the number of scored tokens. The NLL
of a response is −s̄, except in SLiC-HF, where it is −s.
"""

import torch
from torch import Tensor

from hf_prefopt.losses.base import (
    LossOutput,
    check_positive,
    check_range,
    check_same_shape,
    log1mexp,
    logistic,
    mean_logps,
    pair_rewards,
    per_token,
)
from hf_prefopt.losses.registry import register_loss


@register_loss("cpo", paper="2401.08417")
def cpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    beta: float = 0.1,
    cpo_alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """ℓ(β(s_w − s_l)) + α·NLL(y_w): a contrastive loss without a reference, plus the NLL of the chosen response.

    Contrastive preference optimization, eq. 5. s_w and s_l are the policy's summed log-probs of the chosen response y_w
    and of the rejected one, and ℓ(z) = −log σ(z). The NLL is averaged over tokens. To use another preference loss in
    place of ℓ, set `sft_weight` to α, and choose `simpo`, or `hinge` or `ipo` with `reference_free=True`. The implicit
    reward is βs.

    Use it if a reference model does not fit into memory, and the chosen responses are good enough to imitate.

    Args:
        policy_chosen_logps, policy_rejected_logps: `[B]`. Summed log-probs (nats).
        chosen_lengths: `[B]`. Numbers of scored tokens in the chosen responses.
        beta: > 0.
        cpo_alpha: α ≥ 0.
        label_smoothing: ε in [0, 0.5), the probability that a label is flipped.

    Raises:
        ValueError: shapes differ or a value is out of range.
    """
    check_positive(beta=beta)
    check_range("cpo_alpha", cpo_alpha, 0.0)
    check_range("label_smoothing", label_smoothing, 0.0, 0.5)
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        chosen_lengths=chosen_lengths,
    )
    preference = logistic(beta * (policy_chosen_logps - policy_rejected_logps), label_smoothing)
    nll = -per_token(policy_chosen_logps, chosen_lengths)
    return LossOutput(
        preference + cpo_alpha * nll,
        pair_rewards(beta * policy_chosen_logps, beta * policy_rejected_logps),
        {"preference": preference.detach(), "nll": nll.detach()},
    )


@register_loss("orpo", paper="2403.07691", is_average_loss=True)
def orpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 0.1,
) -> LossOutput:
    """NLL(y_w) + β·ℓ(log-odds_w − log-odds_l), log-odds = s̄ − log(1 − e^s̄).

    Odds-ratio preference optimization, eq. 6 and 7; β is the paper's λ. s̄ is a response's mean log-prob per scored
    token, and ℓ(z) = −log σ(z). e^s̄ is the geometric mean of the token probabilities, and the odds are those of this
    probability. log(1 − e^s̄) is computed without loss of precision for likely responses. The NLL is −s̄_w, over the
    chosen response only, as in the paper. The authors' code and TRL's ORPOTrainer compute it over prompt and response;
    see `orpo_sequence`. The implicit reward is β·s̄.

    Use it to align a base model in one stage, without supervised fine-tuning first and without a reference.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    check_positive(beta=beta)
    chosen, rejected = mean_logps(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths)
    log_odds_ratio = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    preference = logistic(log_odds_ratio)
    return LossOutput(
        beta * preference - chosen,
        pair_rewards(beta * chosen, beta * rejected),
        {"preference": preference.detach(), "nll": -chosen.detach(), "log_odds_ratio": log_odds_ratio.detach()},
    )


@register_loss("orpo_sequence", paper="2403.07691", is_average_loss=True)
def orpo_sequence_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    policy_prompt_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    prompt_lengths: Tensor,
    beta: float = 0.1,
) -> LossOutput:
    """NLL(x, y_w) + β·ℓ(log-odds_w − log-odds_l): ORPO with an NLL that includes the prompt.

    The NLL is −(s_x + s_w)/(n_x + n_w), as in the authors' code and in TRL's ORPOTrainer. s_x is the summed log-prob of
    the prompt from its second token on, and n_x the number of these tokens. s_w and n_w are the same quantities for the
    chosen response. All other terms and arguments are those of `orpo_loss`.

    Use it to reproduce runs of the authors' code or of TRL. It also trains the model to write prompts.

    Args:
        policy_prompt_logps: `[B]`. Summed log-probs (nats) of the prompts.
        prompt_lengths: `[B]`. Numbers of scored tokens in the prompts, which may be 0.

    Raises:
        ValueError: shapes differ or beta is out of range.
    """
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_prompt_logps=policy_prompt_logps,
        prompt_lengths=prompt_lengths,
    )
    output = orpo_loss(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, beta)
    nll = -per_token(policy_prompt_logps + policy_chosen_logps, prompt_lengths + chosen_lengths)
    of_response = -per_token(policy_chosen_logps, chosen_lengths)
    return LossOutput(output.losses - of_response + nll, output.rewards, {**output.components, "nll": nll.detach()})


@register_loss("slic_hf", aliases=("slic",), paper="2305.10425")
def slic_hf_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    delta: float = 1.0,
    lambda_coef: float = 0.1,
    length_normalize: bool = False,
) -> LossOutput:
    """max(0, δ − s_w + s_l) − λ·s_w: a margin of δ nats between the sums, plus the NLL of the chosen response.

    Sequence likelihood calibration with human feedback: a rank loss plus a regularizer toward a target, here the chosen
    response. s_w and s_l are the summed log-probs of the chosen and the rejected response. The regularizer is λ times
    the summed NLL of the chosen response, −s_w, as in the paper and in HALOs. With `length_normalize=True`, the NLL is
    divided by the number of scored tokens, as in all other losses here; λ then needs another value. The implicit reward
    is s.

    Use it if you want a fixed margin in log-probs, and the chosen responses are good enough to imitate.

    Args:
        delta: δ > 0, nats. lambda_coef: λ ≥ 0.

    Raises:
        ValueError: shapes differ or a value is out of range.
    """
    check_positive(delta=delta)
    check_range("lambda_coef", lambda_coef, 0.0)
    check_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        chosen_lengths=chosen_lengths,
    )
    preference = torch.relu(delta - policy_chosen_logps + policy_rejected_logps)
    nll = -(per_token(policy_chosen_logps, chosen_lengths) if length_normalize else policy_chosen_logps)
    return LossOutput(
        preference + lambda_coef * nll,
        pair_rewards(policy_chosen_logps, policy_rejected_logps),
        {"preference": preference.detach(), "nll": nll.detach()},
    )


@register_loss("sft", is_average_loss=True, computes_reward_metrics=False)
def sft_loss(policy_chosen_logps: Tensor, chosen_lengths: Tensor) -> LossOutput:
    """NLL(y_w) = −s̄_w: supervised fine-tuning on the chosen responses; each NLL is divided by the response's length.

    s̄_w is the chosen response's summed log-prob divided by its number of scored tokens.

    Use it in a mixture of losses (by name or through `sft_weight`), or alone, as a baseline that is trained on the
    chosen responses.

    Raises:
        ValueError: shapes differ.
    """
    check_same_shape(policy_chosen_logps=policy_chosen_logps, chosen_lengths=chosen_lengths)
    return LossOutput(-per_token(policy_chosen_logps, chosen_lengths))
