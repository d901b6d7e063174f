"""The scoring forward pass: a causal language model's forward that can return log-probs of given tokens.

`install_scoring` replaces the attribute `forward` of two module instances: the causal language model and its head. Both
are inside the wrappers of PEFT and of the engine. The hooks of these wrappers (gathering, unsharding, casting,
bookkeeping) therefore see ordinary calls. Without the argument `scored_rows`, the model behaves as before, so
generation and other evaluations still work.
"""

import inspect
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from transformers import PreTrainedModel

from hf_prefopt.batch import PreferenceBatch, ResponseScores
from hf_prefopt.scoring.around import AROUND_INPUTS
from hf_prefopt.scoring.attention import SEGMENT_INPUTS, no_mask
from hf_prefopt.scoring.fused_head import chunk_rows as chunk_rows_of
from hf_prefopt.scoring.head import (
    STATISTICS,
    LogitTransform,
    full_precision,
    is_plain_linear,
    linear_head_logps,
    module_head_logps,
    predictions,
)
from hf_prefopt.scoring.lengths import own_lengths, own_positions, ropes_by_length
from hf_prefopt.scoring.lower_states import LowerStates, takes_lower_states
from hf_prefopt.scoring.tail import auxiliary_loss, body_of, own_logits

# Rows of logits per chunk; more rows do not fit a CPU's cache. On a GPU, a budget of bytes sets the number (see
# `fused_head`).
CHUNK_ROWS = {"cpu": 512}
# The assumed vocabulary size for a head without the attribute `out_features`.
_LARGE_VOCABULARY = 262_144
# Names of the per-token statistics that are not functions of the policy's log-probs: the head's input, and the KL to
# the reference.
HIDDEN, VOCABULARY_KL = "hidden", "vocabulary_kl"
# Key of the routers' auxiliary loss, which belongs to the whole forward pass and not to a token.
AUX_LOSS = "aux_loss"
_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", *SEGMENT_INPUTS, *AROUND_INPUTS)
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
# Model types that multiply by the divisor instead of dividing.
_INVERTED = ("hyperclovax",)


def logit_transform(config: Any, temperature: float = 1.0) -> LogitTransform:
    """Return the transformation that a model applies to its logits, from known names in its config.

    A model may use an unknown name, or a known name with another meaning, so `scoring.agreement` tests the result.
    """
    text_config = config.get_text_config()

    def value(names: tuple[str, ...]) -> float | None:
        return next((v for name in names if (v := getattr(text_config, name, None)) is not None), None)

    divisor = value(_DIVISORS) or 1.0
    divisor = 1 / divisor if text_config.model_type in _INVERTED else divisor
    return LogitTransform((value(_FACTORS) or 1.0) / divisor, value(_CAPS), temperature)


def base_causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return the transformers causal language model inside PEFT's wrapper, or the model itself if it is not wrapped."""
    inside = getattr(model, "get_base_model", None) if hasattr(model, "peft_config") else None
    return cast(PreTrainedModel, model if inside is None else inside())


class ScoringModel(PreTrainedModel):
    """The type of a model after `install_scoring`, used only by type checkers.

    Attributes:
        plain_forward: The model's own forward.
        ropes_by_length: Names of the rotary embeddings whose frequencies depend on the sequence length.
        has_own_tail: True after `score_by_own_logits`.
    """

    plain_forward: Callable[..., Any]
    ropes_by_length: list[str]
    has_own_tail: bool


class ScoringHead(nn.Module):
    """The type of a head after `install_scoring`, used only by type checkers.

    Attributes:
        plain_forward: The head's own forward.
        logit_transform: The values of the fields of a `LogitTransform`.
    """

    plain_forward: Callable[..., Any]
    logit_transform: tuple[Any, ...]


def install_scoring(model: nn.Module, temperature: float = 1.0) -> None:
    """Install the scoring forward pass on a model (with or without PEFT); a second call changes the temperature.

    Raises:
        ValueError: the model is not a causal language model: it is an encoder-decoder, or has no output embeddings.
    """
    causal_lm = base_causal_lm(model)
    if causal_lm.config.is_encoder_decoder or causal_lm.config.get_text_config().is_encoder_decoder:
        raise ValueError(
            f"{type(causal_lm).__name__} is an encoder-decoder model (config.is_encoder_decoder=True), which is not "
            "supported: choose a decoder-only model, such as AutoModelForCausalLM loads"
        )
    head = causal_lm.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(causal_lm).__name__} has no language-model head (get_output_embeddings() is None)")
    cast(ScoringModel, causal_lm).ropes_by_length = ropes_by_length(causal_lm)
    # Stored as plain numbers, so that a pickled model can be loaded where this package is not installed.
    head.logit_transform = astuple(logit_transform(causal_lm.config, temperature))
    for module, with_scoring in ((causal_lm, _scoring_forward), (head, _head_forward)):
        # accelerate's hooks, which move weights to the device, call the forward stored as `_old_forward`.
        place = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
        if not _is_scoring(getattr(module, place)):
            module.plain_forward = getattr(module, place)
            setattr(module, place, MethodType(_in_place_of(module.plain_forward, with_scoring), module))


def _is_scoring(forward: Callable) -> bool:
    """Return True if a forward, after removing accelerate's wrappers, is a scoring forward."""
    inner = inspect.unwrap(forward, stop=lambda function: hasattr(function, "in_place_of"))
    return hasattr(inner, "in_place_of")


def transform_of(head: nn.Module) -> LogitTransform:
    """Return the logit transformation that `install_scoring` stored on a head."""
    return LogitTransform(*cast(ScoringHead, head).logit_transform)


def _in_place_of(method: Callable, function: Callable) -> Callable:
    """Return a function that calls `function(self, ...)` and has the signature of the bound method `method`.

    `generate` and PEFT inspect this signature. The returned function is named `forward`, so that pickle resolves it to
    the class's own forward: a model saved by `torch.save` is loaded as the plain model.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    shown = inspect.signature(method)
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    attributes = vars(forward)
    attributes["in_place_of"] = method
    attributes["__signature__"] = shown.replace(parameters=[self_parameter, *shown.parameters.values()])
    return forward


def _scoring_forward(self: ScoringModel, *args: Any, scored_rows: Tensor | None = None, **kwargs: Any) -> Any:
    """Run the model's forward; with `scored_rows`, return log-probs and statistics of the targets instead of logits."""
    if scored_rows is None:
        return self.plain_forward(*args, **kwargs)
    names = ("targets", "token_stats", "width", "reference_predictions", "with_aux_loss")
    targets, token_stats, width, reference, with_aux_loss = (kwargs.pop(name) for name in names)
    kwargs |= {"use_cache": False, "return_dict": True} | ({"output_router_logits": True} if with_aux_loss else {})
    tokens = _tokens_of_sequences(kwargs) if with_aux_loss else None
    if kwargs.get("segment_queries") is not None:
        kwargs["attention_mask"] = no_mask(scored_rows)
    elif self.ropes_by_length:
        kwargs["position_ids"] = own_positions(kwargs["attention_mask"])
    body = body_of(self)
    if not takes_lower_states(body):
        kwargs.pop("lower_states", None)
    with own_lengths(self, self.ropes_by_length):
        outputs = body(*args, **kwargs)
    hidden = outputs.last_hidden_state
    aux = {AUX_LOSS: auxiliary_loss(self, outputs, tokens)} if tokens is not None else {}
    # Adapters may put virtual tokens before a sequence, so the last `width` positions are taken.
    hidden = hidden[:, -width:].reshape(-1, hidden.shape[-1]).index_select(0, scored_rows)
    if scores_by_own_logits(self):
        outputs["last_hidden_state"] = hidden[:0]  # only the other outputs are used
        return aux | _own_target_logps(self, outputs, hidden, targets, token_stats)
    head = self.get_output_embeddings()
    return aux | head(hidden, targets=targets, token_stats=token_stats, reference_predictions=reference)


def _tokens_of_sequences(inputs: dict[str, Any]) -> Tensor:
    """Return the positions of all tokens except padding, in the flattened batch.

    The positions of a shared prompt occur once for each of its responses.
    """
    shared, around = inputs.get("segment_key_index"), inputs.get("around_tokens")
    if shared is not None:
        return shared
    places = inputs["attention_mask"].flatten().nonzero().squeeze(1)
    return places if around is None else around.flatten().index_select(0, places)


def score_by_own_logits(causal_lm: PreTrainedModel) -> None:
    """Make the model compute logits with its own forward, which is slower than calling only its head."""
    head = causal_lm.get_output_embeddings()
    head.logit_transform = astuple(LogitTransform(temperature=transform_of(head).temperature))
    cast(ScoringModel, causal_lm).has_own_tail = True


def scores_by_own_logits(causal_lm: PreTrainedModel) -> bool:
    """Return True if `score_by_own_logits` was called on the model."""
    return getattr(causal_lm, "has_own_tail", False)


def _chunk_rows(head: nn.Module, device: torch.device) -> int:
    """Return the number of rows of logits that are computed at once."""
    return CHUNK_ROWS.get(device.type) or chunk_rows_of(getattr(head, "out_features", _LARGE_VOCABULARY))


def _head_forward(self: ScoringHead, hidden: Tensor, *args: Any, targets: Tensor | None = None, **asked: Any) -> Any:
    """Run the head's forward; with `targets`, return the result of `_target_logps`."""
    return self.plain_forward(hidden, *args) if targets is None else _target_logps(self, hidden, targets, **asked)


@torch.compiler.disable  # the chunked computation is already optimized, and the number of chunks depends on the batch
def _target_logps(
    head: ScoringHead,
    hidden: Tensor,
    targets: Tensor,
    token_stats: tuple[str, ...] = (),
    reference_predictions: Callable[[slice], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute the log-probs of the targets and the requested statistics, in chunks of rows.

    Returns:
        Tensors, keyed by name: `[N]`, and `[N, H]` for "hidden".
    """
    chunk_rows = _chunk_rows(head, hidden.device)
    statistics = tuple(name for name in token_stats if name in STATISTICS)
    settings = (targets, transform_of(head), statistics, chunk_rows)
    names = ("token_logps", *statistics)
    plain_forward = head.plain_forward
    if VOCABULARY_KL not in token_stats and is_plain_linear(head):
        outputs = linear_head_logps(hidden, head.weight, head.bias, *settings)
    else:
        names = (*names, VOCABULARY_KL) if VOCABULARY_KL in token_stats else names
        least = 0 if is_plain_linear(head) else _chunks_of_all_ranks(head, hidden, chunk_rows)
        outputs = module_head_logps(plain_forward, hidden, *settings, reference_predictions, least)
    given = {HIDDEN: hidden} if HIDDEN in token_stats else {}
    return dict(zip(names, outputs, strict=True)) | given


@torch.compiler.disable
def _own_target_logps(
    causal_lm: PreTrainedModel, outputs: Any, hidden: Tensor, targets: Tensor, token_stats: tuple[str, ...]
) -> dict[str, Tensor]:
    """Compute log-probs and the statistics in `STATISTICS` like `_target_logps`, but with the model's own logits."""
    head = causal_lm.get_output_embeddings()
    chunk_rows = _chunk_rows(head, hidden.device)
    # Each chunk calls the head, and under FSDP2 all ranks must call it equally often.
    is_sharded = isinstance(head, FSDPModule)
    least = _most_chunks(None, hidden, chunk_rows) if is_sharded else _chunks_of_all_ranks(head, hidden, chunk_rows)
    tail = partial(own_logits, causal_lm, outputs)
    values = module_head_logps(tail, hidden, targets, transform_of(head), token_stats, chunk_rows, least_chunks=least)
    return dict(zip(("token_logps", *token_stats), values, strict=True))


def _chunks_of_all_ranks(head: nn.Module, hidden: Tensor, chunk_rows: int) -> int:
    """Return the maximum number of chunks over ranks if each call of the head gathers weights (ZeRO-3), otherwise 0."""
    groups = [cast(Any, p).ds_process_group for p in head.parameters() if hasattr(p, "ds_tensor")]
    return _most_chunks(groups[0], hidden, chunk_rows) if groups else 0


def _most_chunks(group: Any, hidden: Tensor, chunk_rows: int) -> int:
    """Return the maximum number of chunks over the ranks of a process group (`None`: all ranks)."""
    most = torch.tensor(-(-len(hidden) // chunk_rows), device=hidden.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
    return int(most)


class _PlainForward(nn.Module):
    """A module that calls a head's own forward and bypasses the engine's hooks on the head."""

    head: ScoringHead

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = cast(ScoringHead, head)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.head.plain_forward(hidden)


def head_predictions(head: nn.Module, hidden: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Compute the log-probs `[C, V]` (nats) of every token from hidden states `[C, H]`.

    Args:
        head: Head of a model prepared by `install_scoring`.
        hidden: Input of the head at the scored positions.
        weights: Unsharded parameters, keyed by name, that replace the head's own parameters.
    """
    if not weights:
        return predictions(head, hidden, transform_of(head))
    named = {f"head.{name}": tensor for name, tensor in weights.items()}
    plain = _PlainForward(head)
    return predictions(lambda rows: functional_call(plain, named, (rows,)), hidden, transform_of(head))


def score(
    model: nn.Module,
    batch: PreferenceBatch,
    token_stats: tuple[str, ...] = (),
    reference_predictions: Callable[[slice], Tensor] | None = None,
    with_aux_loss: bool = False,
    lower_states: LowerStates | None = None,
) -> ResponseScores:
    """Compute the log-probs of a batch's scored tokens with a model prepared by `install_scoring`.

    Args:
        model: The model, or an engine's wrapper around it.
        batch: The batch, on the model's device.
        token_stats: Names of additional per-token statistics: the names in `scoring.head.STATISTICS`, "hidden" for the
            head's input, and "vocabulary_kl" for the KL between reference and policy.
        reference_predictions: Function that maps a slice of the scored tokens to the reference's log-probs `[C, V]`;
            required for "vocabulary_kl".
        with_aux_loss: If True, also compute the load-balancing loss of a mixture of experts' routers.
        lower_states: Object that holds the output of the lower decoder layers for this batch. If it is empty, the
            output is recorded in it. Otherwise, these layers do not run, and the recorded output is used.

    Returns:
        The scores, with gradients if gradients are enabled.

    Raises:
        RuntimeError: the scoring forward pass is not installed, or something has replaced it.
    """
    model_inputs = {name: value for name, value in batch.items() if name in _MODEL_INPUTS}
    asked = {
        "scored_rows": batch["scored_rows"],
        "targets": batch["targets"],
        "token_stats": token_stats,
        "width": batch["input_ids"].shape[1],
        "reference_predictions": reference_predictions,
        "with_aux_loss": with_aux_loss,
    }
    if lower_states is not None:
        asked["lower_states"] = lower_states
    try:
        outputs = model(**model_inputs, **asked)
    except TypeError as error:
        if "scored_rows" not in str(error):
            raise
        raise _replaced_forward(model) from error
    if not isinstance(outputs, dict) or "token_logps" not in outputs:
        raise _replaced_forward(model)
    token_logps = outputs.pop("token_logps")
    token_logps = token_logps.to(full_precision(token_logps.dtype))
    aux_loss = outputs.pop(AUX_LOSS, None)
    lengths = batch["response_lengths"]
    return ResponseScores(token_logps, batch["response_index"], lengths, outputs, aux_loss, lower_states)


def _replaced_forward(model: nn.Module) -> RuntimeError:
    name = type(base_causal_lm(getattr(model, "module", model))).__name__
    return RuntimeError(
        f"the forward of {name} does not accept scored_rows: install_scoring was not called on the model, or something "
        "(such as a kernel library) replaced the forward later. Replace it before you pass the model to the trainer"
    )
