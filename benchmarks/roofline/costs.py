"""Compute the cost of one operator on a GPU: kernel launches, FLOP, and bytes read and written.

The bytes are those of inputs and outputs, each moved once; caches and repeated reads are not modeled. An operator is
one launch, unless it is a view or in `LAUNCHES`.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
# Operators that launch no kernel, although their schemas do not say that they are views or only allocate memory.
FREE = {
    "_unsafe_view",
    "_reshape_alias",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "set_",
    "resize_",
    "_local_scalar_dense",
    "device",
}
# The number of kernels of operators that launch several in PyTorch's CUDA implementation.
LAUNCHES = {
    "_varlen_attn": 2,  # one kernel fills the state of the random generator
    "_varlen_attn_backward": 3,  # the sums of dO · O, the products, and the conversion of dQ to half precision
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "nonzero": 3,
    "sort": 2,
    "topk": 2,
    "cumsum": 1,
    "embedding_dense_backward": 5,
    "masked_scatter": 2,
    "masked_scatter_backward": 4,
}
# PyTorch sorts by index first, so that values with equal indices are added in order.
ACCUMULATED = 8
# The number of tensors per launch of a `foreach` kernel, keyed by its number of lists, and the elements of its blocks.
FOREACH_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
FOREACH_BLOCKS, FOREACH_CHUNK = 320, 65_536
PICKS = {"embedding", "index_select", "gather", "index"}
FILLS = {"fill_", "zero_", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "arange", "new_zeros"}
FILLS |= {"new_ones", "new_full", "scalar_tensor", "normal_", "uniform_"}
ADDS_AT = {"scatter_add_", "index_add_", "index_put_", "scatter_", "_index_put_impl_"}


@cache
def name_of(function: Any) -> str:
    """Return the name of an operator without namespace and overload."""
    return function._schema.name.split("::")[1]


def dense_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; elements that a stride of zero repeats count once."""
    count = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return count * tensor.element_size()


def tensors_in(*values: Any) -> list[Tensor]:
    """Return the tensors on the device among arguments or results."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_cuda]


@cache
def is_view(function: Any) -> bool:
    """Return whether an operator only returns views of its arguments."""
    aliases = [r.alias_info for r in function._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def is_between_devices(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether an operator copies from the host to the device or back."""
    if name == "copy_":
        return args[0].device.type != args[1].device.type
    target = kwargs.get("device")
    return name == "_to_copy" and target is not None and torch.device(target).type != args[0].device.type


def launches(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Return the number of kernels that an operator launches."""
    name = name_of(function)
    if name in FREE or is_view(function):
        return 0
    if is_between_devices(name, args, kwargs):
        return 0  # done by a copy engine
    if name.startswith(("_foreach", "_fused")):
        return _foreach_launches([arg for arg in args if isinstance(arg, list | tuple) and tensors_in(arg)])
    if name in ("index_put_", "index_put", "_index_put_impl_") and len(args) > 3 and args[3]:
        return ACCUMULATED
    return LAUNCHES.get(name, 1)


def _foreach_launches(lists: list[Sequence[Tensor]]) -> int:
    lists = [tensors for tensors in lists if len(tensors) == len(lists[0])]
    blocks = sum(-(-tensor.numel() // FOREACH_CHUNK) for tensor in lists[0])
    return max(-(-len(lists[0]) // FOREACH_TENSORS[min(len(lists), 5)]), -(-blocks // FOREACH_BLOCKS))


def moved_bytes(function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Return the bytes that an operator reads and writes on the device."""
    name = name_of(function)
    if name in FREE or is_view(function):
        return 0
    written = sum(map(dense_bytes, tensors_in(result)))
    if name in FILLS:
        return written
    if name in PICKS:
        return 2 * written + sum(map(dense_bytes, tensors_in(args[1:])))
    if name in ADDS_AT:
        given = tensors_in(args[1:])
        return sum(map(dense_bytes, given)) + 2 * dense_bytes(given[-1])  # the selected positions are read and written
    if name == "copy_" or "out" in kwargs:
        args = args[1:] if name == "copy_" else args
        return written + sum(map(dense_bytes, _distinct(tensors_in(args))))
    if name.startswith("_fused_adam"):
        parameters, gradients, *states = (sum(map(dense_bytes, tensors_in(arg))) for arg in args[:4])
        return 2 * (parameters + sum(states)) + gradients
    if name.startswith("_foreach") and not written:
        return 2 * sum(map(dense_bytes, tensors_in(args[0]))) + sum(map(dense_bytes, tensors_in(args[1:])))
    return written + sum(map(dense_bytes, _distinct(tensors_in(args, kwargs))))


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def flop(function: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, pairs: int) -> int:
    """Return the FLOP of an operator's products.

    Args:
        pairs: number of (query, key) pairs in the segments of variable-length attention; it depends on the values of
            the bounds.
    """
    name = name_of(function)
    if name in ("_varlen_attn", "_varlen_attn_backward"):
        query = tensors_in(args)[0]  # in the backward pass, the gradient of the output
        return _attention_flop(query.shape[-2], pairs, query.shape[-1], backward=name.endswith("backward"))
    if name.startswith(("_scaled_dot_product_flash", "_scaled_dot_product_efficient")):
        return _sdpa_flop(name, args, kwargs)
    if name == "_grouped_mm":
        return _grouped_flop(*args[:2])
    packet = function._overloadpacket
    if packet not in flop_registry:
        return 0
    return flop_registry[packet](*args, **{k: v for k, v in kwargs.items() if k != "out"}, out_val=result)


def _attention_flop(heads: int, pairs: int, width: int, backward: bool) -> int:
    """Return the FLOP of attention: two products of 2 · width per pair; the backward pass has five."""
    return (5 if backward else 2) * 2 * heads * pairs * width


def _sdpa_flop(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    backward = name.endswith("backward")
    query, key = args[1:3] if backward else args[:2]
    batch, heads, queries, width = query.shape
    causal = "flash" in name  # other kernels get a mask, and also compute the scores that the mask removes
    pairs = queries * (queries + 1) // 2 if causal else queries * key.shape[2]
    return _attention_flop(heads, batch * pairs, width, backward)


def _grouped_flop(first: Tensor, second: Tensor) -> int:
    """Return the FLOP of a grouped product: rows times their group's matrix, or, if both have rows, outer products."""
    if first.dim() == second.dim() == 2:
        return 2 * first.shape[0] * first.shape[1] * second.shape[1]
    rows = first if first.dim() == 2 else second
    other = second if first.dim() == 2 else first
    return 2 * rows.shape[0] * other.shape[-1] * other.shape[-2]
