"""Attention over segments: several responses share the tokens of their prompt in one packed row.

A row contains groups `[prompt | response 1 | … | response K]`. The queries of a row are divided into contiguous
segments: the prompt together with the first response, and each other response. A segment attends to the tokens of its
prompt and to its own tokens; their keys are gathered by index. Within a segment, the causal mask is aligned so that the
last query sees the last key. The segment bounds are keyword arguments of the model's forward, never globals, because
activation checkpointing runs a layer's forward again in the backward pass.

Attention over segments is registered with transformers' `AttentionInterface` under a name of its own. Calls without
segments go to the model's own attention implementation.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_prefopt.batch import SegmentLengths

SEGMENT_INPUTS = ("segment_queries", "segment_keys", "segment_key_index", "segment_longest", "segment_lengths")
_PREFIX = "hf_prefopt|"
# Keyword arguments of attention functions that are ignored, because they do not affect attention over segments.
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "cache_position"}
_HARMLESS |= {"output_router_logits"}
_VARLEN_DTYPES = (torch.bfloat16, torch.float16)
# True if the kernel supports fewer key heads than query heads. The kernel of PyTorch 2.11 does not.
_VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


class UnsupportedAttention(RuntimeError):
    """Raised if the model's attention needs a feature that attention over segments does not support."""


class LostSegments(UnsupportedAttention):
    """Raised if the model's decoder layers do not pass keyword arguments on to their attention."""


class SegmentAttention(str):
    """The name under which attention over segments is registered, for one of the model's own implementations.

    It is pickled as the name of this implementation, such as "sdpa".
    """

    def __reduce__(self):
        return str, (self.removeprefix(_PREFIX),)

    def __copy__(self):
        return self

    def __deepcopy__(self, memo: dict):
        return self


def install_segment_attention(model: PreTrainedModel) -> None:
    """Make a model use attention over segments for calls with segments; a second call has no effect.

    Calls without segments still use the model's own implementation.
    """
    for config, implementation in _implementations(model):
        if not implementation.startswith(_PREFIX):
            config._attn_implementation_internal = _registered(implementation)


def remove_segment_attention(model: PreTrainedModel) -> None:
    """Undo `install_segment_attention`."""
    for config, implementation in _implementations(model):
        config._attn_implementation_internal = implementation.removeprefix(_PREFIX)


def _implementations(model: nn.Module) -> list[tuple[Any, str]]:
    """Return each config of the model's modules with the name of its attention implementation.

    To change the name, set `_attn_implementation_internal`: setting `_attn_implementation` also changes nested configs.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    named = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    return [(config, implementation) for config, implementation in named if implementation is not None]


def attention_implementations(model: nn.Module) -> set[str]:
    """Return the names of the model's own attention implementations, such as "sdpa"."""
    return {implementation.removeprefix(_PREFIX) for _, implementation in _implementations(model)}


def _registered(implementation: str) -> str:
    """Return the name of attention over segments for an implementation. The first call registers it."""
    name = SegmentAttention(_PREFIX + implementation)
    if name not in ALL_ATTENTION_FUNCTIONS:
        # The parameters are named as in transformers' own functions, because some models pass the mask by name.
        def attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
        ):
            if kwargs.get("segment_queries") is None:
                _refuse_lost_segments(attention_mask)
                return _plain(implementation, module)(module, query, key, value, attention_mask, **kwargs)
            hidden = _hidden_by_mask(module, kwargs)
            return segment_attention(query, key, value, attention_mask=attention_mask, **hidden, **kwargs), None

        AttentionInterface.register(name, attention)
        if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def no_mask(like: Tensor) -> Tensor:
    """Return a placeholder for the attention mask, for forward passes in which segments determine the attention.

    transformers passes a four-dimensional mask on unchanged, so it builds no mask.
    """
    return like.new_ones(1, 1, 1, 1, dtype=torch.int64)


def _refuse_lost_segments(mask: Tensor | None) -> None:
    """Raise `LostSegments` if a module received the mask from `no_mask` but no segments."""
    if mask is not None and mask.shape == (1, 1, 1, 1) and mask.dtype == torch.int64:
        raise LostSegments("its decoder layers do not pass keyword arguments on to their attention")


def describe_attention(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """Return a phrase that says how a model's forward pass computes attention.

    Args:
        device: Device of the model.
        dtype: Dtype in which the model computes.
    """
    implementations = sorted({implementation for _, implementation in _implementations(model)})
    named = " and ".join(implementation.removeprefix(_PREFIX) for implementation in implementations)
    if not any(implementation.startswith(_PREFIX) for implementation in implementations):
        return named
    one_by_one = f"PyTorch's ({named}), one response at a time"
    if not fits_varlen(dtype, (8, 8), capability_of(device)):
        return one_by_one
    config = model.config.get_text_config()
    others = [name for name, known in _WITHOUT_KERNEL.items() if known(model, config)]
    return f"{one_by_one}, because of its {' and '.join(others)}" if others else "variable-length kernel"


# Features that the kernel does not support, each with a function that returns True if a model has the feature.
_WITHOUT_KERNEL: dict[str, Callable[[PreTrainedModel, Any], bool]] = {
    "sinks": lambda model, config: any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in model.named_parameters()),
    "soft-cap": lambda model, config: bool(getattr(config, "attn_logit_softcapping", None)),
    "chunks": lambda model, config: "chunked_attention" in (getattr(config, "layer_types", None) or ()),
    "head dimension": lambda model, config: not _fits_width(_head_widths(config)),
}


def _head_widths(config: Any) -> tuple[int, int]:
    """Return the head dimensions of keys and values according to a config; (8, 8) if it does not have them."""
    hidden, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    width = getattr(config, "head_dim", None) or (hidden // heads if hidden and heads else 8)
    return width, getattr(config, "v_head_dim", None) or width


def _plain(implementation: str, module: nn.Module) -> Callable:
    """Return the attention function of the model's own implementation. "eager" is defined in the model's own file."""
    own_eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, own_eager)


def _hidden_by_mask(module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, int]:
    """Return the window size and the chunk size that a module puts only into its mask.

    Such a size is not an argument of the module's attention function, which here gets no mask. Examples are the chunks
    of Llama 4, and the windows of PhiMoE and Qwen2-MoE. A window size in the config is ignored if the model's file
    builds no mask with windows.
    """
    config, file = cast(Any, getattr(module, "config", None)), sys.modules[type(module).__module__]
    types = getattr(config, "layer_types", None)
    own_type = types[module.layer_idx] if types and hasattr(module, "layer_idx") else None
    hidden: dict[str, int | None] = {}
    if own_type == "chunked_attention":
        hidden["chunk"] = config.attention_chunk_size
    builds_windows = hasattr(file, "create_sliding_window_causal_mask")
    if "sliding_window" not in kwargs and builds_windows and own_type in (None, "sliding_attention"):
        hidden["sliding_window"] = getattr(config, "sliding_window", None)
    return {name: size for name, size in hidden.items() if size}


@torch.compiler.disable  # each batch has different segments and would cause a recompilation
def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    segment_queries: Tensor,
    segment_keys: Tensor,
    segment_key_index: Tensor,
    segment_longest: tuple[int, int],
    segment_lengths: SegmentLengths,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    chunk: int | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> Tensor:
    """Compute causal attention from the queries of each segment to the keys of the segment.

    Args:
        query: `[1, heads, T, D]`.
        key, value: `[1, key heads, T, D]`; the D of `value` may differ.
        segment_queries: `[S + 1]` int32. For each of the S segments, the index of its first query; then the end of the
            last segment.
        segment_keys: `[S + 1]` int32. The same for the gathered keys.
        segment_key_index: `[Tk]` int64. For each gathered key, its position in the row.
        segment_longest: Maximum number of queries in a segment, and maximum number of keys in a segment.
        segment_lengths: Number of queries and number of keys in each segment. They are on the CPU, so that computing
            segments one by one needs no device synchronization.
        attention_mask: Placeholder of one element (see `no_mask`) or `None`; a larger mask raises an error.
        scaling: Factor of the scores. Default: 1 / sqrt(D).
        dropout: Dropout rate of the attention weights.
        sliding_window: Maximum number of keys that a query sees, including the key at its own position.
        softcap: Cap of the scores: cap · tanh(score / cap).
        s_aux: `[heads]`. Attention sinks: for each head, the score of an additional key whose value is zero.
        chunk: Chunk size: a query at position i sees a key at position j only if i // chunk = j // chunk.

    Returns:
        `[1, T, heads, D]`.

    Raises:
        UnsupportedAttention: the module needs another feature, such as a position bias or non-causal attention.
    """
    _check_supported(attention_mask, is_causal, others)
    query, key, value = _in_one_dtype(query, key, value)
    key, value = key.index_select(2, segment_key_index), value.index_select(2, segment_key_index)
    window, chunk = (size if size and size < segment_longest[1] else None for size in (sliding_window, chunk))
    is_plain = softcap is None and s_aux is None and chunk is None and dropout == 0
    if is_plain and fits_varlen(query.dtype, (query.shape[-1], value.shape[-1]), capability_of(query.device)):
        return _varlen(query, key, value, segment_queries, segment_keys, segment_longest, scaling, window)
    keys = segment_lengths.keys
    pieces = [
        _one_segment(q, k, v, scaling, dropout, (window, chunk), softcap, s_aux)
        for q, k, v in zip(
            query.split(segment_lengths.queries, 2), key.split(keys, 2), value.split(keys, 2), strict=True
        )
    ]
    # Contiguous like the output of transformers' own functions, because some models call view() on it.
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous()


def _check_supported(attention_mask: Tensor | None, is_causal: bool | None, others: dict[str, Any]) -> None:
    """Raise `UnsupportedAttention` for a mask, for non-causal attention, and for unknown arguments."""
    if attention_mask is not None and attention_mask.numel() > 1:
        raise UnsupportedAttention("attention with a mask that the module builds itself")
    unknown = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
    if unknown or is_causal is False:
        raise UnsupportedAttention(f"attention with {', '.join(unknown) or 'is_causal=False'}")


def _in_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast query, key and value to one dtype: under autocast to autocast's dtype, otherwise to the dtype of the value.

    Rotary embeddings and norms in fp32 can leave queries and keys in fp32 while values are in half precision.
    """
    device = query.device.type
    autocast = torch.is_autocast_enabled(device) and value.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def fits_varlen(dtype: torch.dtype, widths: tuple[int, int], capability: tuple[int, int] | None) -> bool:
    """Return True if the variable-length flash kernel can compute attention with these properties.

    The kernel supports neither soft-cap, sinks, chunks nor dropout, which this function does not check.

    Args:
        dtype: Dtype of queries, keys and values; must be bf16 or fp16.
        widths: Head dimensions of keys and values; must be equal, a multiple of 8, and at most 256.
        capability: Result of `capability_of`; must be 8.0 (Ampere) or newer.
    """
    fits_device = capability is not None and capability >= (8, 0)
    return fits_device and dtype in _VARLEN_DTYPES and _fits_width(widths)


def _fits_width(widths: tuple[int, int]) -> bool:
    return widths[0] == widths[1] <= 256 and widths[0] % 8 == 0


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a CUDA device; `None` for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _varlen(query, key, value, query_bounds, key_bounds, longest: tuple[int, int], scaling, window) -> Tensor:
    """Compute all segments with one call of the variable-length flash kernel.

    The kernel aligns its causal mask so that the last query of a segment sees the last key.
    """
    options: dict[str, Any] = {"window_size": (window - 1 if window else -1, 0)}
    groups = query.shape[1] // key.shape[1]
    if _VARLEN_HAS_GQA:
        options["enable_gqa"] = groups > 1
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    query, key, value = (tensor.squeeze(0).transpose(0, 1).contiguous() for tensor in (query, key, value))
    found = varlen_attn(query, key, value, query_bounds, key_bounds, *longest, scale=scaling, **options)
    return cast(Tensor, found).unsqueeze(0)


def _one_segment(query, key, value, scaling, dropout, hidden: tuple[int | None, int | None], softcap, sinks) -> Tensor:
    """Compute the attention output `[1, heads, n, D]` of a segment with n queries.

    This function calls PyTorch's attention, or uses explicit formulas if there is a soft-cap or a sink. `hidden` is
    (window size, chunk size).
    """
    queries, keys, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    mask = None
    if queries != keys or any(hidden):
        mask = _causal_mask(queries, keys, *hidden, query.device)
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
        )
    mask = _causal_mask(queries, keys, *hidden, query.device) if mask is None else mask
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = _softmax(scores.masked_fill(~mask, float("-inf")), sinks)
    return F.dropout(weights.to(query.dtype), dropout) @ value


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Compute the attention weights `[1, heads, n, k]` of n queries over k keys, in fp32 or float64.

    If there are sinks, the softmax also includes the sink of the head, so the weights of the keys sum to less than 1.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]


def _causal_mask(queries: int, keys: int, window: int | None, chunk: int | None, device: torch.device) -> Tensor:
    """Return a mask `[queries, keys]` bool. True where a query sees a key.

    The last query is at the position of the last key.

    Args:
        window, chunk: See `sliding_window` and `chunk` of `segment_attention`. The first key is at position 0.
    """
    positions = torch.arange(keys, device=device)
    of_query = positions[keys - queries :, None]
    mask = of_query >= positions
    mask = mask if window is None else mask & (of_query - positions < window)
    return mask if chunk is None else mask & (of_query // chunk == positions // chunk)
