"""Choose the layout for a model: the first of "shared", "around" and "padded" that is exact for the model.

A layout is exact if it gives the scores of padded sequences, except for rounding. In "shared" (`scoring.attention`) and
"around" (`scoring.around`), the responses to a prompt share the tokens of the prompt.

Static checks exclude known incompatibilities. A probe on the model itself decides all other cases, because a layout
that is not exact raises no error and only gives wrong numbers.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_prefopt.batch import PreferenceBatch
from hf_prefopt.data.layouts import AroundCollator, PaddedCollator, SharedCollator
from hf_prefopt.scoring.agreement import body_precision, device_of, made_up_tokens
from hf_prefopt.scoring.around import install_around, reason_against_layers
from hf_prefopt.scoring.attention import LostSegments, install_segment_attention, remove_segment_attention
from hf_prefopt.scoring.forward import base_causal_lm, score
from hf_prefopt.scoring.handing import hand_segments_on
from hf_prefopt.scoring.lengths import length_limit
from hf_prefopt.scoring.modes import evaluation_mode
from hf_prefopt.scoring.switched import restore
from hf_prefopt.scoring.tail import body_of

# RuntimeErrors that are unrelated to the layout: out of memory, a broken device, a lost process.
_FAILURES = (torch.OutOfMemoryError, torch.AcceleratorError, torch.distributed.DistError)
_NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
_STATELESS_LAYERS = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "attention",
    "dense",
    "sparse",
    "moe",
}
# Names of window and chunk sizes in configs and modules; in the probe they are set to _SHORT tokens.
_WINDOWS = {
    "attention_chunk_size",
    "attention_window_size",
    "local_attention_window_len",
    "sliding_window",
    "window_size",
}
_SHORT = 8


@dataclass(frozen=True)
class Reason:
    """The reason why a layout is not exact for a model.

    Attributes:
        words: The reason as text.
        cause: Exception that the model's forward raised, if any.
    """

    words: str
    cause: Exception | None = None


@dataclass(frozen=True)
class Layout:
    """A chosen layout: its name ("shared", "around" or "padded"), and a phrase `why` with the reason for the choice."""

    name: str
    why: str


@dataclass(frozen=True)
class _Candidate:
    """A layout to try.

    Attributes:
        gain: Phrase that says what the layout saves.
        known: Function that returns the known reason why a model does not support the layout, or `None`. It does not
            run the model.
        install, remove: Functions that prepare a model for the layout, and undo the preparation.
        collate: Function that collates rows in this layout.
    """

    gain: str
    known: Callable[[nn.Module], str | None]
    install: Callable[[nn.Module], None]
    remove: Callable[[nn.Module], None]
    collate: Callable[[Sequence[Mapping[str, Any]]], PreferenceBatch]


def settled_layout(
    asked: str,
    models: Sequence[nn.Module],
    compute_dtype: torch.dtype | None = None,
    known: str | None = None,
) -> Layout:
    """Choose one layout for all models, and prepare the models for it.

    Args:
        asked: Name of a layout, or "auto" for the first layout that is exact.
        models, compute_dtype: As for `reason_against`.
        known: Reason for "padded" that does not depend on the models alone; `None` if there is no such reason.

    Raises:
        ValueError: in the requested layout, the scores of a model differ from those of padded sequences.
    """
    for model in models:
        for candidate in _CANDIDATES.values():
            candidate.remove(model)
    against: list[str] = []
    for name, candidate in _CANDIDATES.items():
        if asked not in ("auto", name):
            continue
        reason = Reason(known) if known else _first_reason(name, models, compute_dtype)
        if reason is None:
            return Layout(name, "; ".join([candidate.gain, *against]))
        for model in models:
            candidate.remove(model)
        if asked == name:
            raise ValueError(
                f"layout={name!r} is not exact for this model: {reason.words}; choose layout='auto'"
            ) from reason.cause
        against.append(f"not {name} because {reason.words}")
    if asked == "padded":
        return Layout("padded", "requested by layout='padded'")
    return Layout("padded", f"because {known}" if known else "; ".join(against))


def _first_reason(name: str, models: Sequence[nn.Module], compute_dtype: torch.dtype | None) -> Reason | None:
    """Return the reason why the first incompatible model cannot be scored in a layout, with the model's class.

    Return `None` if all models can be scored in the layout. They are then prepared for it.
    """
    for model in models:
        reason = reason_against(name, model, compute_dtype)
        if reason is not None:
            return Reason(f"{reason.words} ({type(base_causal_lm(model)).__name__})", reason.cause)
    return None


def reason_against(name: str, model: nn.Module, compute_dtype: torch.dtype | None = None) -> Reason | None:
    """Return the reason why a layout is not exact for a model; if it is exact, prepare the model and return `None`.

    Args:
        name: "shared" or "around".
        model: A model prepared by `scoring.forward.install_scoring`, on its device.
        compute_dtype: Autocast's dtype, if the model computes in another dtype than its weights.

    Raises:
        RuntimeError: the model cannot run in any layout: out of memory, or a device or process was lost.
    """
    candidate = _CANDIDATES[name]
    known = _known_against_both(model) or candidate.known(model)
    if known is not None:
        return Reason(known)
    candidate.install(model)
    reason = _probe(candidate, model, compute_dtype)
    if reason is not None and isinstance(reason.cause, LostSegments):
        hand_segments_on(base_causal_lm(model))
        reason = _probe(candidate, model, compute_dtype)
    if reason is not None:
        candidate.remove(model)
    return reason


def reason_of_length(models: Sequence[nn.Module], max_length: int | None) -> str | None:
    """Return the reason why, in one of the models, a prompt's hidden states depend on the length of the response.

    Return `None` if they do not in any model.

    Args:
        max_length: Maximum sequence length in tokens; `None` for no maximum.
    """
    limits = [limit for model in models if (limit := length_limit(model)) is not None]
    if not limits or (max_length is not None and max_length <= min(limits)):
        return None
    limit = min(limits)
    return f"rotary embeddings depend on the length of sequences over {limit} tokens (max_length={limit} avoids it)"


def _known_against_both(model: nn.Module) -> str | None:
    if not isinstance(model, PeftModel):
        return None
    if model.active_peft_config.is_prompt_learning:
        return "prompt-learning adapters put virtual tokens before every sequence"
    if any(getattr(config, "alora_invocation_tokens", None) for config in model.peft_config.values()):
        return "aLoRA adapters are active only after the last invocation tokens of a row"
    return None


def _known_against_shared(model: nn.Module) -> str | None:
    causal_lm = base_causal_lm(model)
    config = causal_lm.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ())
    if selecting := sorted(kind for kind in types if "indexed" in kind):
        return f"its layers ({', '.join(selecting)}) select tokens from the whole row"
    stateful = types - _STATELESS_LAYERS
    if stateful or getattr(causal_lm, "_is_stateful", False):
        return f"its layers ({', '.join(sorted(stateful)) or 'stateful'}) carry a state along the row"
    if getattr(config, "alibi", False):
        return "ALiBi measures distances along the row"
    if getattr(config, "attn_temperature_tuning", False):
        return "its attention scales queries by their position in the row (attn_temperature_tuning)"
    if not causal_lm._can_set_attn_implementation():
        return "its attention does not use transformers' attention interface"
    return None


def _known_against_around(model: nn.Module) -> str | None:
    causal_lm = base_causal_lm(model)
    if getattr(causal_lm.config.get_text_config(), "layerdrop", 0):
        return "it skips layers at random (layerdrop)"
    return reason_against_layers(causal_lm)


def _remove_shared(model: nn.Module) -> None:
    remove_segment_attention(base_causal_lm(model))
    restore(base_causal_lm(model))


# Layouts in the order in which they are tried. Collators are looked up at each call, so that tests can replace them.
_CANDIDATES = {
    "shared": _Candidate(
        gain="each prompt is computed once, and no padding",
        known=_known_against_shared,
        install=lambda model: install_segment_attention(base_causal_lm(model)),
        remove=_remove_shared,
        collate=lambda rows: SharedCollator()(rows),
    ),
    "around": _Candidate(
        gain="each prompt is computed once, and no padding, but for the token mixers",
        known=_known_against_around,
        install=lambda model: install_around(causal_lm := base_causal_lm(model), body_of(causal_lm)),
        remove=lambda model: restore(base_causal_lm(model)),
        collate=lambda rows: AroundCollator(PaddedCollator(0))(rows),
    ),
}


def _probe(candidate: _Candidate, model: nn.Module, compute_dtype: torch.dtype | None) -> Reason | None:
    """Compare the scores of synthetic preference pairs in a layout with those of the pairs as padded sequences.

    The comparison is repeated with other prompts. Finally, the first response to each prompt is changed, which must not
    affect the second response.

    Returns:
        The reason why the layout is not exact, or `None`.
    """
    rows = _made_up_rows(base_causal_lm(model))
    other_prompts = [{**row, "prompt_ids": row["prompt_ids"][::-1]} for row in rows]
    other_chosen = [{**row, "response_ids": [row["response_ids"][0][::-1], row["response_ids"][1]]} for row in rows]
    try:
        with torch.no_grad(), evaluation_mode(model), _short_windows(model):
            (padded, size), (padded_prompts, _) = (
                _score(model, PaddedCollator(0)(variant)) for variant in (rows, other_prompts)
            )
            (found, _), (found_prompts, _), (found_chosen, _) = (
                _score(model, candidate.collate(variant)) for variant in (rows, other_prompts, other_chosen)
            )
    except (TypeError, ValueError, RuntimeError, LookupError) as error:  # UnsupportedAttention is a RuntimeError
        if is_failure(error):
            raise
        said = next(iter(str(error).splitlines()), "no message")
        return Reason(f"its forward raises an error ({type(error).__name__}: {said})", cause=error)
    rejected = torch.arange(len(found)) % 2 == 1  # the rows' pairs alternate chosen, rejected
    effect = (padded_prompts - padded).abs().mean()
    # The noise covers rounding in a sum of log-probs. It is far below the effect of a token that is wrongly visible or
    # hidden.
    noise = body_precision(model, compute_dtype) * torch.minimum(padded.abs(), size).mean() + 0.01 * effect
    if (found_chosen - found)[rejected].abs().mean() > noise:
        return Reason("a response depends on another response to the same prompt")
    if (found - padded).abs().mean() > noise or (found_prompts - padded_prompts).abs().mean() > noise:
        return Reason("its log-probs differ from those of padded sequences")
    return None


@contextmanager
def _short_windows(model: nn.Module) -> Iterator[None]:
    """Limit attention windows and chunks, in configs and modules, to `_SHORT` tokens within this context.

    The probe's sequences can then be short and still be longer than two windows. A layout that ignores a window makes
    most tokens wrongly visible, so the probe detects it.
    """
    configs = [config for module in model.modules() if (config := vars(module).get("config")) is not None]
    configs += [config.get_text_config() for config in configs if hasattr(config, "get_text_config")]
    holders = {id(each): vars(each) for each in (*configs, *model.modules())}.values()
    sizes = [(holder, name, holder[name]) for holder in holders for name in _WINDOWS & holder.keys()]
    long = [(holder, name, size) for holder, name, size in sizes if isinstance(size, int) and size > _SHORT]
    for holder, name, _ in long:
        holder[name] = _SHORT
    try:
        yield
    finally:
        for holder, name, size in long:
            holder[name] = size


def is_failure(error: Exception) -> bool:
    """Return True if an error has nothing to do with the layout, for example if the device is out of memory."""
    return isinstance(error, _FAILURES) or any(words in str(error) for words in _NO_MEMORY)


def _score(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return each response's summed log-prob and distance from a uniform distribution, each `[R]` on the CPU.

    The distance is the sum over the tokens of |log p + log V| + (log V − entropy), in nats. Here p is the probability
    of the token, V the vocabulary size, and the entropy is that of the predicted distribution. The distance bounds the
    size of rounding errors: a model with an almost uniform distribution has log-probs close to −log V for any input.
    """
    scores = score(model, _on_device(batch, device_of(model)), ("entropy",))
    uniform = math.log(base_causal_lm(model).config.get_text_config().vocab_size)
    from_uniform = (scores.token_logps + uniform).abs() + uniform - scores.token_stats["entropy"]
    size = scores.sum_by_response(from_uniform).nan_to_num(nan=math.inf)
    return scores.logps.float().cpu(), size.float().cpu()


def made_up_batch(layout: str, model: nn.Module) -> PreferenceBatch:
    """Return a batch of three synthetic preference pairs in a layout, on the model's device."""
    rows = _made_up_rows(base_causal_lm(model))
    batch = _CANDIDATES[layout].collate(rows) if layout in _CANDIDATES else PaddedCollator(0)(rows)
    return _on_device(batch, device_of(model))


def _on_device(batch: Mapping[str, Any], device: torch.device) -> PreferenceBatch:
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return cast(PreferenceBatch, moved)


def _made_up_rows(causal_lm: PreTrainedModel) -> Sequence[dict[str, Any]]:
    """Return three synthetic preference pairs of random tokens.

    The longest sequence has more than two windows of `_SHORT` tokens, if the model's maximum length allows it.
    """
    config, longest_response = causal_lm.config, 11
    known = (getattr(config.get_text_config(), "max_position_embeddings", None), length_limit(causal_lm))
    most = min((limit for limit in known if limit), default=1 << 20)
    long_prompt = max(1, min(2 * _SHORT + 6, most - longest_response))
    generator = random.Random(0)

    def row(prompt: int, chosen: int, rejected: int) -> dict[str, Any]:
        ids = [made_up_tokens(config, n, generator) for n in (prompt, chosen, rejected)]
        masks = [[1] * chosen, [1] * rejected]
        return {"prompt_ids": ids[0], "response_ids": ids[1:], "scored_masks": masks, "pairs": [[0, 1]], "row": 0}

    return [row(7, 5, 9), row(long_prompt, 4, 6), row(3, longest_response, 2)]
