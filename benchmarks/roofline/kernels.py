"""Kernels that a CPU build of PyTorch lacks: the choice of the attention kernel, and TRL's Triton kernels.

Without them, PyTorch would compute attention with separate operators and full score matrices, and TRL's head would use
its slow path.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.roofline.counting import Counting

HALF = (torch.bfloat16, torch.float16)
aten = torch.ops.aten


def cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Replace `F.scaled_dot_product_attention` as on an NVIDIA GPU: flash without a mask, memory-efficient with one.

    Raises:
        NotImplementedError: a GPU would use another kernel, which is not counted.
    """
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if (query.dtype not in HALF and attn_mask is None) or query.shape[-1] > 256 or dropout_p:
        raise NotImplementedError(f"attention in {query.dtype}, width {query.shape[-1]}, dropout {dropout_p}")
    if attn_mask is None:
        if not is_causal:
            raise NotImplementedError("attention without a mask that is not causal")
        with torch.autocast("cuda", enabled=False):
            return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]
    if enable_gqa:
        raise NotImplementedError("grouped heads with a mask")
    if attn_mask.dtype == torch.bool:
        zero, never = (torch.full((), x, dtype=query.dtype, device=query.device) for x in (0.0, float("-inf")))
        attn_mask = torch.where(attn_mask, zero, never)
    attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    with_gradient = torch.is_grad_enabled() and query.requires_grad
    with torch.autocast("cuda", enabled=False):
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, with_gradient, 0.0, False, scale=scale
        )[0]


class TritonKernel:
    """A Triton kernel over a tile of logits, called as `kernel[grid](tile, …)`. Each call is recorded as one launch.

    Args:
        passes: how often the tile is moved: 1 if it is only read, 2 if it is also written.
    """

    def __init__(self, name: str, passes: int, counting: Counting):
        self._name, self._passes, self._counting = name, passes, counting

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """Return the function that launches the kernel."""

        def launch(tile: Tensor, *_: Any, **__: Any) -> None:
            bytes_moved = self._passes * tile.numel() * tile.element_size()
            self._counting.launch(self._name, "head", bytes_moved, tile.dtype)

        return launch


def _add_product(sums: Tensor, first: Tensor, second: Tensor) -> None:
    """Compute `sums += first @ second` in fp32 from half precision; a CPU build has no operator for this."""
    aten.addmm.out(sums, first, second, out=sums)


def _made_up_list(tensor: Tensor) -> Any:
    """Return the result of `tolist`: the host waits once, and all numbers have a fixed value."""
    values: Any = tensor.flatten()[0].item()
    for size in reversed(tensor.shape):
        values = [values] * size
    return values


@contextmanager
def cuda_kernels(counting: Counting) -> Iterator[None]:
    """Return a context in which PyTorch, transformers and TRL call the functions that they would call on a GPU."""
    patches: list[Any] = [
        patch.object(torch.nn.functional, "scaled_dot_product_attention", cuda_attention),
        patch.object(FakeTensor, "tolist", _made_up_list),
        # It returns False for fake tensors, so each gradient would be clipped by separate launches.
        patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True),
        patch("transformers.masking_utils.is_tracing", lambda *_: False),
    ]
    with contextlib.suppress(ImportError):
        from trl.kernels import chunked_logprob
        from trl.trainer import utils

        patches += [patch.object(module, "_use_triton", lambda _: True) for module in (chunked_logprob, utils)]
        kernels = {"_forward_kernel": 1, "_backward_kernel": 2}
        patches += [
            patch.object(chunked_logprob, name, TritonKernel(name, passes, counting))
            for name, passes in kernels.items()
        ]
        triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b))
        patches += [
            patch.object(chunked_logprob, "triton", triton, create=True),
            patch.object(chunked_logprob, "_addmm_fp32", _add_product),
        ]
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield
