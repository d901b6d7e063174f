"""Convert metrics to TRL's names and conventions.

`Objective.as_logged` is set to one of these conversions. A conversion takes the metrics of the examples and the inputs
of the losses, and returns the metrics to log.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from hf_prefopt.kinds import PAIRS, Metric
from hf_prefopt.objective.objective import AsLogged

Metrics = dict[str, Metric]
Inputs = Mapping[str, Tensor]

# Maps the metric of a loss's component to TRL's name for it, and to 1 or −1, the factor that gives TRL's sign.
RENAMED: Mapping[str, tuple[str, float]] = {
    "loss/cpo_nll": ("nll_loss", 1.0),
    "loss/sft": ("nll_loss", 1.0),
    "loss/orpo_sequence_nll": ("nll_loss", 1.0),
    "loss/orpo_sequence_log_odds_ratio": ("log_odds_chosen", 1.0),
    "loss/orpo_sequence_preference": ("log_odds_ratio", -1.0),
    "loss/kto_kl": ("kl", 1.0),
}


# A table for docs/from_trl.md. Each row has metrics under TRL's names, the trainers that log them, and what
# `PreferenceTrainer` logs for them.
LOGGED = (
    ("`loss`, `grad_norm`, `learning_rate`", "all", "the same"),
    (
        "`rewards/chosen`, `rewards/rejected`, `rewards/margins`",
        "DPO",
        "the loss's own reward, which is per token for `ipo` and others",
    ),
    ("`rewards/chosen`, `rewards/rejected`, `rewards/margins`", "KTO, CPO, ORPO, TPO", "the same"),
    ("`rewards/accuracies`", "DPO, CPO, ORPO, TPO", "the same; a tie counts half"),
    ("`logps/chosen`, `logps/rejected`", "all; per token for `ipo`, `simpo`, `alphapo`, `tpo-l`, ORPO", "summed"),
    *(
        (f"`{name}`", trainers, f"`{ours}`" if sign > 0 else f"minus `{ours}`")
        for name, trainers, ours, sign in (
            ("nll_loss", "CPO", "loss/cpo_nll", 1),
            ("nll_loss", "ORPO", "loss/orpo_sequence_nll", 1),
            ("log_odds_chosen", "ORPO", "loss/orpo_sequence_log_odds_ratio", 1),
            ("log_odds_ratio", "ORPO", "loss/orpo_sequence_preference", -1),
            ("kl", "KTO", "loss/kto_kl", 1),
        )
    ),
)
# Metrics that this package logs for every loss, but TRL does not log at all.
OURS = (
    "`log_ratios/…` (Δ log p per token, accuracy and margins of log-ratios), `ref_kl`, `logps_per_token/…`, "
    "`lengths/…`, `tokens_per_second`, `positions_saved`, `peak_memory_gib`, `mfu`: see "
    "[displacement.md](displacement.md)."
)
LEFT_OUT = (
    ("`entropy`, `mean_token_accuracy`", "they need a pass over the vocabulary for every token"),
    ("`logits/chosen`, `logits/rejected`", "logits are not kept"),
    ("`num_tokens`", "set `include_num_input_tokens_seen`, which logs `num_input_tokens_seen`"),
    ("`kl` of `apo_zero_unpaired`", "it is 0 by definition"),
)


def renamed(metrics: Metrics, inputs: Inputs) -> Metrics:
    """Rename the metrics of losses' components to TRL's names. All other metrics keep their names."""
    signs = {name: RENAMED.get(name, (name, 1.0)) for name in metrics}
    return {to: Metric(sign * metrics[name].values, metrics[name].counted) for name, (to, sign) in signs.items()}


def renamed_per_token(metrics: Metrics, inputs: Inputs) -> Metrics:
    """Rename metrics as `renamed` does, and divide each response's log-prob by its number of scored tokens."""
    lengths = {f"logps/{side}": inputs[f"{side}_lengths"].clamp(min=1) for side in ("chosen", "rejected")}
    averaged = {name: Metric(metrics[name].values / length) for name, length in lengths.items()}
    return renamed(metrics | averaged, inputs)


def rewards_of_sums(metrics: Metrics, inputs: Inputs, beta: float) -> Metrics:
    """Replace the reward metrics by those of TRL's DPOTrainer, whatever the loss.

    TRL's rewards are β(s − s_ref), where s and s_ref are a response's summed log-probs under policy and reference. If
    these are not among the inputs, return the metrics unchanged.
    """
    sides = [(f"policy_{side}_logps", f"ref_{side}_logps") for side in ("chosen", "rejected")]
    if not all(name in inputs for pair in sides for name in pair):
        return metrics
    rewards = torch.stack([beta * (inputs[policy] - inputs[ref]) for policy, ref in sides], dim=-1)
    return metrics | PAIRS.metrics(rewards.detach(), dict(inputs))


def of_dpo(beta: float) -> AsLogged:
    """Return a function that converts metrics to the conventions of TRL's DPOTrainer for this β."""
    return partial(rewards_of_sums, beta=beta)
