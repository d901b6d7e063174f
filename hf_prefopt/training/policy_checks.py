"""Check how a policy can be scored and compared with its reference: errors, warnings, and notes for the summary."""

import logging
import re
from collections.abc import Sequence

import torch
from torch import nn

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.objective.objective import Objective
from hf_prefopt.scoring.agreement import training_noise
from hf_prefopt.scoring.forward import VOCABULARY_KL, base_causal_lm

logger = logging.getLogger(__name__)

NOISE = (
    "%s gives different results in training mode and in evaluation mode, even without dropout: log-probs of synthetic "
    "tokens differ by up to %.2g nats. The reference is scored in evaluation mode, so the policy differs from the "
    "reference before the first step. Check the model's config for router jitter or noise"
)
INCOMPARABLE = (
    "metric_for_best_model=%r depends on the reference, which is updated every %d steps, so its values before and "
    "after an update are not comparable: choose a metric of the policy alone, such as 'logps/chosen'"
)


LOST_STEPS = (
    "%.0f %% of the trained %s weights are too large for a step of learning_rate=%g to change: rounding removes a step "
    "that is smaller than half of the distance to the next number. Load the weights in float32 (dtype='float32'; "
    "bf16=True still computes in bf16), train an adapter, or raise learning_rate"
)
# Number of weights that are checked in each tensor.
_SAMPLED = 4096


def warn_of_lost_steps(model: nn.Module, args: PreferenceConfig) -> None:
    """Warn if rounding removes most updates of 16-bit weights by an Adam optimizer.

    Adam changes each weight by about the learning rate per step.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]
    if not trained or "adam" not in str(getattr(args.optim, "value", args.optim)) or args.process_index:
        return
    # Neighboring numbers of a dtype around w are at least |w| · eps / 2 apart, and a step below half of that is lost.
    lost = [
        p.detach().flatten()[:_SAMPLED].abs().float() * torch.finfo(p.dtype).eps / 4 > args.learning_rate
        for p in trained
    ]
    share = torch.cat([each.cpu() for each in lost]).float().mean().item()
    if share > 0.5:
        logger.warning(LOST_STEPS, 100 * share, str(trained[0].dtype).removeprefix("torch."), args.learning_rate)


def own_logits_note(model: nn.Module, objective: Objective, losses: Sequence[str]) -> str:
    """Return a note about a model that must be scored with the logits of its own forward pass.

    Raises:
        ValueError: a loss needs the distributions over the whole vocabulary, which such models do not support.
    """
    name = type(model).__name__
    if VOCABULARY_KL in objective.token_stats:
        raise ValueError(
            f"{', '.join(losses)} needs the distribution over the whole vocabulary, which is not "
            f"supported for {name}: its forward changes the logits in a way that its config does not describe; "
            "choose another loss"
        )
    return f"scored with the logits of {name}'s own forward, which is slower than its output embeddings alone"


def warn_of_incomparable_metric(args: PreferenceConfig) -> None:
    """Warn if `metric_for_best_model` depends on the reference.

    Call this function only if the reference changes during training.
    """
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    if re.match(r"loss$|loss/|rewards/", metric):
        logger.warning(INCOMPARABLE, metric, args.ref_model_sync_steps)


def warn_of_noise(model: nn.Module, args: PreferenceConfig, autocast_dtype: torch.dtype | None, warns: bool) -> None:
    """Warn if the policy gives different results in training and evaluation mode although its dropout is off.

    Call it on every rank, with `warns=True` on one rank.
    """
    if args.disable_dropout is False or args.neftune_noise_alpha is not None:
        return
    noise = training_noise(model, autocast_dtype)
    if noise and warns:
        logger.warning(NOISE, type(base_causal_lm(model)).__name__, noise)
