"""Check that a resumed run has the same reference as before, by comparing log-probs of synthetic tokens.

A checkpoint restores the policy's weights but not the reference, which is made from the model that the trainer gets. If
that model was loaded from the checkpoint, the half-trained policy would become the reference.
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
    """Return the reference's log-probs of synthetic tokens, in nats. The tokens depend only on the model's config.

    If an engine shards the model, call this function on every rank. Call it without autocast, because differences
    between models are easier to see in fp32.
    """
    tokens = made_up_tokens(base_causal_lm(reference.model).config, _TOKENS, random.Random(0))
    ids = torch.tensor([tokens], device=device_of(reference.model))
    return reference.score(scored_batch(ids, ids[0].roll(-1)[:, None])).token_logps.tolist()


def warn_of_another_reference(before: Sequence[float], now: Sequence[float], model: nn.Module) -> None:
    """Warn if the reference's log-probs differ from those saved in a checkpoint by more than rounding explains.

    Args:
        before, now: results of `made_up_logps`: those saved in the checkpoint, and those of the current reference.
        model: a model whose parameters have the dtypes of the reference.
    """
    if len(before) != len(now):
        return  # the checkpoint belongs to another model
    old, new = torch.tensor(before), torch.tensor(now)
    apart = float((old - new).abs().max())
    rounding = relative_rounding(model) * float((old.abs() + old.abs().mean()).max())
    if apart > rounding:
        logger.warning(
            "the checkpoint was written by a run with another reference: log-probs of synthetic tokens differ by up to "
            "%.2g nats, but rounding explains only %.1g. Resume with the model that the run started from, not with the "
            "one in the checkpoint, whose weights are loaded in any case; or start a new run with this reference, "
            "without resume_from_checkpoint",
            apart,
            rounding,
        )
