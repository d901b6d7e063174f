"""How fast this processor multiplies matrices, and how many operations a step spends on it.

The share of a step is FLOP / seconds / the best speed of a single product: 1 if a step were nothing but products at
that speed.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROWS, REPEATS = 2048, 8


def product_speed(model: nn.Module) -> float:
    """The best FLOP/s of `[2048, in] · [in, out]` in fp32 over the shapes of the model's weights.

    The number of threads is the current one.
    """
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2 and not p.requires_grad}
    return max(matmul_speed(shape) for shape in shapes)


def matmul_speed(shape: Sequence[int]) -> float:
    """FLOP/s of `[2048, in] · [in, out]` in fp32 with the current number of threads, where `shape` is (out, in)."""
    a, b = torch.randn(ROWS, shape[1]), torch.randn(*shape)
    a @ b.T
    start = time.process_time()
    for _ in range(REPEATS):
        a @ b.T
    return REPEATS * 2 * ROWS * shape[0] * shape[1] / (time.process_time() - start)


def flop_counter() -> FlopCounterMode:
    """Return PyTorch's counter of the FLOP of products, extended by attention's kernel for CPUs.

    Attention counts the (query, key) pairs that the kernel computes: half of them with `is_causal`, all with a mask.
    """
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )


def _attention(query: Any, key: Any, value: Any, dropout_p: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    batch, heads, queries, width = query
    pairs = queries * (queries + 1) // 2 if is_causal else queries * key[2]
    return 2 * 2 * batch * heads * pairs * width


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, dropout_p: float, is_causal: bool, **_: Any
) -> int:
    """Five products where the forward has two: the scores are computed again."""
    return 5 * _attention(query, key, value, dropout_p, is_causal) // 2
