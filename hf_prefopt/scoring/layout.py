"""Which layout a model can be scored in: "shared" where it is exact, "padded" where it is not, and why.

Static checks name what is known not to work. Everything else is decided by a probe on the model itself, because a wrong
layout gives no error, only other numbers.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_prefopt.data.layouts import PaddedCollator, SharedCollator
from hf_prefopt.scoring.agreement import device_of, made_up_tokens
from hf_prefopt.scoring.attention import install_segment_attention, remove_segment_attention
from hf_prefopt.scoring.forward import base_causal_lm, score
from hf_prefopt.scoring.lengths import length_limit
from hf_prefopt.scoring.modes import evaluation_mode

# What says nothing about a layout, although it is a RuntimeError: no memory, a broken device, a lost process.
_FAILURES = (torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistError)
_NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
_STATELESS_LAYERS = {"full_attention", "sliding_attention", "attention", "dense", "sparse", "moe"}


@dataclass(frozen=True)
class Reason:
    """Why a layout is not exact for a model.

    Attributes:
        words: for people.
        cause: the error that the model's forward raised, if that is the reason.
    """

    words: str
    cause: Exception | None = None


@dataclass(frozen=True)
class Layout:
    """How batches are laid out, "shared" or "padded", and why, as a phrase."""

    name: str
    why: str


def settled_layout(
    asked: str,
    models: Sequence[nn.Module],
    max_length: int | None = None,
    compute_dtype: torch.dtype | None = None,
    known: str | None = None,
) -> Layout:
    """The layout that all of these models are scored in.

    Where it is "padded", the models' attention is what it was before.

    Args:
        asked: "shared", "padded", or "auto": "shared" where that is exact.
        models, max_length, compute_dtype: as for `reason_against_shared`.
        known: a reason against "shared" that the models do not show.

    Raises:
        ValueError: "shared" is asked for, and not exact for one of the models.
    """
    reason = Reason(known) if known else None
    if asked != "padded" and reason is None:
        reason = _first_reason(models, max_length, compute_dtype)
    if reason is None and asked != "padded":
        return Layout("shared", "each prompt is computed once, and no padding")
    for model in models:
        remove_segment_attention(base_causal_lm(model))
    if asked == "shared":
        raise ValueError(
            f"layout='shared' is not exact for this model: {reason.words}; choose layout='auto'"
        ) from reason.cause
    return Layout("padded", "as layout='padded' asks" if asked == "padded" else f"because {reason.words}")


def _first_reason(models: Sequence[nn.Module], *limits: Any) -> Reason | None:
    """Why one of the models cannot be scored in the layout "shared", and which."""
    for model in models:
        reason = reason_against_shared(model, *limits)
        if reason is not None:
            return Reason(f"{reason.words} ({type(base_causal_lm(model)).__name__})", reason.cause)
    return None


def reason_against_shared(
    model: nn.Module, max_length: int | None = None, compute_dtype: torch.dtype | None = None
) -> Reason | None:
    """Why the layout "shared" is not exact for this model, or `None` where it is; only then the model is ready for it.

    Args:
        model: a model that `scoring.forward.install_scoring` has been called on, on its device.
        max_length: the longest sequence that will be scored; a sliding window beyond it does not matter.
        compute_dtype: the dtype the model computes in, where autocast makes it another than its weights'.

    Raises:
        RuntimeError: the model cannot be run at all: there is no memory for it, or its device or a process is lost.
    """
    known = known_reason(model) or _reason_of_length(model, max_length)
    if known is not None:
        return Reason(known)
    install_segment_attention(base_causal_lm(model))
    reason = _probe(model, max_length, compute_dtype)
    if reason is not None:
        remove_segment_attention(base_causal_lm(model))
    return reason


def known_reason(model: nn.Module) -> str | None:
    """What is known to be wrong with the layout "shared" for a model, without running it."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return "prompt-learning adapters put virtual tokens before every sequence"
    causal_lm = base_causal_lm(model)
    config = causal_lm.config.get_text_config()
    stateful = set(getattr(config, "layer_types", None) or ()) - _STATELESS_LAYERS
    if stateful or getattr(causal_lm, "_is_stateful", False):
        return f"its layers ({', '.join(sorted(stateful)) or 'stateful'}) carry a state along the row"
    if getattr(config, "alibi", False):
        return "ALiBi counts distances along the row"
    if not causal_lm._can_set_attn_implementation():
        return "its attention does not go through transformers' attention interface"
    return None


def _reason_of_length(model: nn.Module, max_length: int | None) -> str | None:
    limit = length_limit(model)
    if limit is None or (max_length is not None and max_length <= limit):
        return None
    return f"its rotary embeddings depend on a sequence's length beyond {limit} tokens (max_length={limit} would do)"


def _probe(model: nn.Module, max_length: int | None, compute_dtype: torch.dtype | None) -> Reason | None:
    """Score a few made-up groups in both layouts, with other prompts, and with other first responses."""
    causal_lm = base_causal_lm(model)
    rows = _made_up_rows(causal_lm.config, max_length)
    other_prompts = [{**row, "prompt_ids": row["prompt_ids"][::-1]} for row in rows]
    other_chosen = [{**row, "response_ids": [row["response_ids"][0][::-1], row["response_ids"][1]]} for row in rows]
    try:
        with torch.no_grad(), evaluation_mode(model):
            padded, padded_prompts = (_score(model, PaddedCollator(0)(variant)) for variant in (rows, other_prompts))
            shared, shared_prompts, shared_chosen = (
                _score(model, SharedCollator()(variant)) for variant in (rows, other_prompts, other_chosen)
            )
    except (TypeError, ValueError, RuntimeError, KeyError) as error:  # UnsupportedAttention is a RuntimeError
        if _is_failure(error):
            raise
        said = next(iter(str(error).splitlines()), "without a word")
        return Reason(f"its forward refuses it ({type(error).__name__}: {said})", cause=error)
    rejected = torch.arange(len(shared)) % 2 == 1  # the rows' pairs alternate chosen, rejected
    effect = (padded_prompts - padded).abs().mean()
    dtype = compute_dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
    # What rounding may do to a sum of log-probs, and far less than what a wrongly seen or unseen token does.
    noise = torch.finfo(dtype).eps * padded.abs().mean() + 0.01 * effect
    if (shared_chosen - shared)[rejected].abs().mean() > noise:
        return Reason("a response sees another response of its prompt")
    if (shared - padded).abs().mean() > noise or (shared_prompts - padded_prompts).abs().mean() > noise:
        return Reason("its log-probs differ from those of padded sequences")
    return None


def _is_failure(error: Exception) -> bool:
    """Whether an error would have come in any layout."""
    return isinstance(error, _FAILURES) or any(words in str(error) for words in _NO_MEMORY)


def _score(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """`[R]`: the summed log-prob of each response, on the CPU."""
    device = device_of(model)
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return score(model, moved).logps.float().cpu()


def _made_up_rows(config: Any, max_length: int | None) -> Sequence[dict[str, Any]]:
    """Three pairs of arbitrary tokens, the longest of them longer than any sliding window that can matter."""
    text_config = config.get_text_config()
    longest = max_length or getattr(text_config, "max_position_embeddings", None) or 1 << 20
    window = min(getattr(text_config, "sliding_window", None) or 0, longest)
    generator = random.Random(0)

    def row(prompt: int, chosen: int, rejected: int) -> dict[str, Any]:
        ids = [made_up_tokens(config, n, generator) for n in (prompt, chosen, rejected)]
        masks = [[1] * chosen, [1] * rejected]
        return {"prompt_ids": ids[0], "response_ids": ids[1:], "scored_masks": masks, "pairs": [[0, 1]], "row": 0}

    return [row(7, 5, 9), row(window + 6, 4, 6), row(3, 11, 2)]
