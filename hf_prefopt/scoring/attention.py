"""Attention over segments: how several responses share the tokens of their prompt in one row without padding.

A row holds groups `[prompt | response 1 | … | response K]`. Its queries fall into contiguous segments: prompt and
first response, and each further response. The keys of a segment are its prompt and itself, gathered by index, causal
with the last query on the last key. The bounds travel through the model's forward as keyword arguments, never in a
global, because activation checkpointing runs a layer's forward again during the backward.

The function is registered with transformers' `AttentionInterface` in front of the implementation that a model has: a
call without segments is that implementation's own.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

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
# What attention modules pass along that has no bearing on the result, or is handled here.
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "cache_position"}
_HARMLESS |= {"output_router_logits"}
_VARLEN_DTYPES = (torch.bfloat16, torch.float16)
# PyTorch 2.11's wants as many key heads as there are query heads.
_VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters


class UnsupportedAttention(RuntimeError):
    """The model's attention asks for something that attention over segments does not have."""


class LostSegments(UnsupportedAttention):
    """The model's decoder layers do not hand keyword arguments on to their attention."""


class SegmentAttention(str):
    """The name of attention over segments in front of an implementation; pickled, it is the implementation's own."""

    def __reduce__(self):
        return str, (self.removeprefix(_PREFIX),)

    def __copy__(self):
        return self

    def __deepcopy__(self, memo: dict):
        return self


def install_segment_attention(model: PreTrainedModel) -> None:
    """Put attention over segments in front of the implementation the model has; doing it again changes nothing."""
    for config, implementation in _implementations(model):
        if not implementation.startswith(_PREFIX):
            config._attn_implementation_internal = _registered(implementation)


def remove_segment_attention(model: PreTrainedModel) -> None:
    """Give a model back the implementations it had before `install_segment_attention`."""
    for config, implementation in _implementations(model):
        config._attn_implementation_internal = implementation.removeprefix(_PREFIX)


def _implementations(model: PreTrainedModel) -> list[tuple[Any, str]]:
    """The config of each module that has one, with the attention it names.

    Written to as `_attn_implementation`, a config would make all configs inside it name the same one.
    """
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    named = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    return [(config, implementation) for config, implementation in named if implementation is not None]


def _registered(implementation: str) -> str:
    """The name of attention over segments in front of an implementation, registered if it is new."""
    name = SegmentAttention(_PREFIX + implementation)
    if name not in ALL_ATTENTION_FUNCTIONS:
        # The parameters have the names of transformers' own functions, for some models pass the mask by name.
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
    """What is given as the mask where segments say what is hidden.

    A mask of four dimensions is handed on as it is, so none is built.
    """
    return like.new_ones(1, 1, 1, 1, dtype=torch.int64)


def _refuse_lost_segments(mask: Tensor | None) -> None:
    """Raise `LostSegments` where a module was given `no_mask`, and no segments."""
    if mask is not None and mask.shape == (1, 1, 1, 1) and mask.dtype == torch.int64:
        raise LostSegments("its decoder layers do not hand keyword arguments on to their attention")


def describe_attention(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> str:
    """Which attention a model's forward runs, as a phrase.

    Args:
        dtype: what the model computes in.
    """
    implementations = sorted({implementation for _, implementation in _implementations(model)})
    named = " and ".join(implementation.removeprefix(_PREFIX) for implementation in implementations)
    if not any(implementation.startswith(_PREFIX) for implementation in implementations):
        return named
    one_by_one = f"PyTorch's ({named}), a response at a time"
    if not fits_varlen(dtype, (1, 1), capability_of(device)):
        return one_by_one
    config = model.config.get_text_config()
    others = [name for name, known in _WITHOUT_KERNEL.items() if known(model, config)]
    return f"{one_by_one}, because of its {' and '.join(others)}" if others else "variable-length kernel"


# What the kernel does not have, and whether a model has it in any layer.
_WITHOUT_KERNEL: dict[str, Callable[[PreTrainedModel, Any], bool]] = {
    "sinks": lambda model, config: any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in model.named_parameters()),
    "soft-cap": lambda model, config: bool(getattr(config, "attn_logit_softcapping", None)),
    "chunks": lambda model, config: "chunked_attention" in (getattr(config, "layer_types", None) or ()),
}


def _plain(implementation: str, module: nn.Module) -> Callable:
    """The attention function that the model would use by itself; "eager" is each model file's own."""
    own_eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, own_eager)


def _hidden_by_mask(module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, int]:
    """What a module's mask would hide, beside later tokens, where the module does not pass it along as a number.

    Llama 4 has its chunks only in the mask, PhiMoE and Qwen2-MoE their windows. What a config has is of no effect in
    models that build no such mask.
    """
    config, file = getattr(module, "config", None), sys.modules[type(module).__module__]
    types = getattr(config, "layer_types", None)
    own_type = types[module.layer_idx] if types and hasattr(module, "layer_idx") else None
    hidden: dict[str, int | None] = {}
    if own_type == "chunked_attention":
        hidden["chunk"] = config.attention_chunk_size
    builds_windows = hasattr(file, "create_sliding_window_causal_mask")
    if "sliding_window" not in kwargs and builds_windows and own_type in (None, "sliding_attention"):
        hidden["sliding_window"] = getattr(config, "sliding_window", None)
    return {name: size for name, size in hidden.items() if size}


@torch.compiler.disable  # the segments of each batch would be compiled anew
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
    """Causal attention of each segment's queries on its own keys.

    Args:
        query: `[1, heads, T, D]`. key, value: `[1, key heads, T, D]`, the latter's D may differ.
        segment_queries, segment_keys: `[S + 1]` int32, where each of the S segments begins among the queries and among
            the gathered keys, and where the last one ends.
        segment_key_index: `[Tk]` int64, the row's position of each gathered key.
        segment_longest: the most queries and the most keys of a segment.
        segment_lengths: all of them, so that no device is waited for where segments are computed one by one.
        attention_mask: of one element, which stands for none; a larger one is of the module's own making.
        sliding_window: a query sees that many keys, itself included. softcap: scores are cap · tanh(score / cap).
        s_aux: `[heads]`, sinks: the logit of one more key, whose value is zero, for each query of a head.
        chunk: a query at position i sees keys at positions j with i // chunk = j // chunk.

    Returns:
        `[1, T, heads, D]`.

    Raises:
        UnsupportedAttention: the module asks for something else, such as a position bias, or no causality.
    """
    if attention_mask is not None and attention_mask.numel() > 1:
        raise UnsupportedAttention("attention with a mask of the module's own making")
    unknown = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
    if unknown or is_causal is False:
        raise UnsupportedAttention(f"attention with {', '.join(unknown) or 'is_causal=False'}")
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
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous()  # as transformers' own functions: some models view it


def _in_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in autocast's dtype, as PyTorch's attention casts them, or without autocast in the value's.

    Rotary embeddings and norms in fp32 leave queries and keys in fp32 beside values in half precision.
    """
    device = query.device.type
    autocast = torch.is_autocast_enabled(device) and value.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def fits_varlen(dtype: torch.dtype, widths: tuple[int, int], capability: tuple[int, int] | None) -> bool:
    """Whether the variable-length flash kernel takes attention without soft-cap, sinks, chunks, and dropout.

    Args:
        dtype: of queries, keys and values: bf16 or fp16.
        widths: of a head's keys and values: the same, and at most 256.
        capability: of the device, as `capability_of` returns it: 8.0 (Ampere) or newer.
    """
    fits_device = capability is not None and capability >= (8, 0)
    return fits_device and dtype in _VARLEN_DTYPES and widths[0] == widths[1] <= 256


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device; `None` for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _varlen(query, key, value, query_bounds, key_bounds, longest, scaling, window) -> Tensor:
    """All segments in one call of the variable-length flash kernel, whose causal mask is aligned at the last key."""
    options: dict[str, Any] = {"window_size": (window - 1 if window else -1, 0)}
    groups = query.shape[1] // key.shape[1]
    if _VARLEN_HAS_GQA:
        options["enable_gqa"] = groups > 1
    elif groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows = (tensor.squeeze(0).transpose(0, 1).contiguous() for tensor in (query, key, value))
    return varlen_attn(*rows, query_bounds, key_bounds, *longest, scale=scaling, **options).unsqueeze(0)


def _one_segment(query, key, value, scaling, dropout, hidden, softcap, sinks) -> Tensor:
    """One segment `[1, heads, n, D]` by PyTorch's attention, or written out where it has a soft-cap or sinks."""
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
    """`[1, heads, n, k]`: softmax over k keys, or over these and the sink of each head, in fp32 (float64 stays)."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]


def _causal_mask(queries: int, keys: int, window: int | None, chunk: int | None, device: torch.device) -> Tensor:
    """`[queries, keys]`, true where a query sees a key: the last query on the last key, and no later one.

    Args:
        window, chunk: as for `segment_attention`; a segment's keys begin at position 0.
    """
    positions = torch.arange(keys, device=device)
    of_query = positions[keys - queries :, None]
    mask = of_query >= positions
    mask = mask if window is None else mask & (of_query - positions < window)
    return mask if chunk is None else mask & (of_query // chunk == positions // chunk)
