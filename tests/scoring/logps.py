"""Log-probs of tokens and sequences from plain logits or hidden states, for use without the trainer.

The trainer's own path is `scoring.forward`, which never holds all logits; these are the definitions it is tested by.
"""

import torch
from torch import Tensor


def token_logps(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log softmax(logits / temperature) at the targets, in fp32 (float64 stays float64).

    Args:
        logits: `[..., V]`, already aligned with the targets (the shift is the caller's).
        targets: `[...]`, token ids.

    Returns:
        `[...]`, nats.

    Raises:
        ValueError: shapes do not agree, or temperature is not above 0.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not agree")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def sequence_logps(
    logits: Tensor, input_ids: Tensor, mask: Tensor, *, average: bool = False, temperature: float = 1.0
) -> Tensor:
    """Return the log-prob of each sequence's scored tokens, `[B]`, summed or averaged.

    Args:
        logits: `[B, T, V]`, as a causal language model returns them for `input_ids`: position t predicts token t + 1.
        input_ids: `[B, T]`. mask: `[B, T]`, 1 for scored tokens; the first token has no prediction.
        average: divide by the number of scored tokens (0 counts as 1).

    Raises:
        ValueError: shapes do not agree, the first token is scored, or temperature is not above 0.
    """
    if input_ids.shape != mask.shape:
        raise ValueError(f"input_ids {tuple(input_ids.shape)} and mask {tuple(mask.shape)} do not agree")
    if bool(mask[:, 0].any()):
        raise ValueError("mask scores the first token of a sequence, which nothing predicts")
    scored = mask[:, 1:].to(torch.bool)
    logps = token_logps(logits[:, :-1], input_ids[:, 1:], temperature).masked_fill(~scored, 0).sum(-1)
    return logps / scored.sum(-1).clamp(min=1) if average else logps


def sequence_logps_from_hidden(
    hidden: Tensor,
    head_weight: Tensor,
    input_ids: Tensor,
    mask: Tensor,
    *,
    average: bool = False,
    temperature: float = 1.0,
) -> Tensor:
    """Return `sequence_logps` for logits = hidden · head_weightᵀ; hidden `[B, T, H]`, head_weight `[V, H]`.

    Raises:
        ValueError: as for `sequence_logps`.
    """
    return sequence_logps(hidden @ head_weight.T, input_ids, mask, average=average, temperature=temperature)


def split_interleaved(values: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows that alternate chosen, rejected, chosen, …, `[2B, ...]`, into (chosen, rejected), `[B, ...]` each.

    Raises:
        ValueError: the number of rows is odd.
    """
    if values.shape[0] % 2:
        raise ValueError(f"{values.shape[0]} rows cannot alternate between chosen and rejected")
    return values[0::2], values[1::2]


def split_concatenated(values: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows with all chosen and then all rejected ones, `[2B, ...]`, into (chosen, rejected), `[B, ...]` each.

    Raises:
        ValueError: the number of rows is odd.
    """
    if values.shape[0] % 2:
        raise ValueError(f"{values.shape[0]} rows are not as many chosen as rejected")
    return values.chunk(2)
