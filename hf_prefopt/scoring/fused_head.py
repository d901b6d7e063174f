"""The log-prob head on a GPU, for heads without gradients of their weight and without a soft-cap.

On a GPU, the log-probs of a chunk are kept in memory, because another pass over the logits would take longer. Here the
kernels of a chunk read and write 24 bytes per logit with a gradient, and 16 without; the kernels of
`head.FrozenHeadLogps` need 40 and 32. The kernels here are the matrix product in half precision, its copy in fp32, the
log-softmax, and a kernel that reads log-probs and writes probabilities in half precision. `benchmarks/head_passes.py`
counts these bytes. Shapes: as in `head`.
"""

import torch
from torch import Tensor

# Memory of a chunk per logit: the product and the probabilities in half precision, logits and log-probs in fp32.
BYTES_PER_LOGIT = 12
BUDGET = 512 * 2**20


def chunk_rows(vocabulary: int, budget: int = BUDGET) -> int:
    """Return the number of rows whose logits fit a budget of bytes, at least 1."""
    return max(1, budget // (BYTES_PER_LOGIT * vocabulary))


def probabilities_without_target(logps: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the softmax `[C, V]` in `dtype`, with 0 at the targets.

    The targets' part of the gradient, 1 − p, is computed from their log-probs: in half precision, p rounds to 1.
    """
    probabilities = torch.exp(logps, out=torch.empty_like(logps, dtype=dtype))
    return probabilities.scatter_(1, targets.unsqueeze(1), 0)


def unit_gradient(logps: Tensor, at_targets: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Compute d logp_target / d hidden for transform.factor = 1: (1 − p_t) w_t − Σ_{v ≠ t} p_v w_v, `[C, H]`.

    Args:
        logps: `[C, V]`, log-probs in full precision. at_targets: `[C]`, the log-probs of the targets.
    """
    others = probabilities_without_target(logps, targets, weight.dtype) @ weight
    return weight[targets] * -torch.expm1(at_targets).unsqueeze(1) - others
