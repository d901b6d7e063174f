"""Whether a resumed run has the reference that it began with: told by log-probs of made-up tokens.

The policy's weights come back from a checkpoint, the reference's do not: it is made of the model that is handed over.
If that model was loaded from the checkpoint, the half-trained policy would be the reference for the rest of the run.
"""

import logging
import random
from collections.abc import Sequence

import torch
from torch import nn

from hf_prefopt.reference.live import LiveReference
from hf_prefopt.scoring.agreement import device_of, made_up_tokens, relative_rounding, scored_batch
from hf_prefopt.scoring.forward import base_causal_lm

logger = logging.getLogger(__name__)

_TOKENS = 16


def made_up_logps(reference: LiveReference) -> list[float]:
    """The reference's log-probs of made-up tokens, in nats; the same tokens for models of one config.

    Engines that shard a model need it on every rank. Call it without autocast: fp32 weights tell more.
    """
    tokens = made_up_tokens(base_causal_lm(reference.model).config, _TOKENS, random.Random(0))
    ids = torch.tensor([tokens], device=device_of(reference.model))
    return reference.score(scored_batch(ids, ids[0].roll(-1)[:, None])).token_logps.tolist()


def warn_of_another_reference(before: Sequence[float], now: Sequence[float], model: nn.Module) -> None:
    """Warn where the log-probs kept in a checkpoint differ from the reference's by more than rounding.

    Args:
        before, now: what `made_up_logps` gave.
        model: has the reference's dtypes.
    """
    if len(before) != len(now):
        return  # another model, which its checkpoint does not fit
    old, new = torch.tensor(before), torch.tensor(now)
    apart = float((old - new).abs().max())
    rounding = relative_rounding(model) * float((old.abs() + old.abs().mean()).max())
    if apart > rounding:
        logger.warning(
            "the checkpoint was written by a run with another reference: log-probs of made-up tokens differ by up to "
            "%.2g nats, and rounding explains %.1g. Resume with the model that the run began with, not with the one in "
            "the checkpoint, whose weights are loaded anyway; or train on without resume_from_checkpoint, from this "
            "reference",
            apart,
            rounding,
        )
