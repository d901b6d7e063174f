"""Parts of the log-prob head on a GPU, for heads whose weight needs no gradient and whose logits have no soft-cap.

On a GPU, the log-probs of a chunk are kept in memory, because another pass over the logits would take longer. Per
logit, the kernels here read and write 24 bytes if a gradient is needed, and 16 bytes if not. The kernels of
`head.FrozenHeadLogps` read and write 40 and 32 bytes. The kernels here are the matrix product in half precision, its
copy in fp32, the log-softmax, and a kernel that reads log-probs and writes probabilities in half precision.
`benchmarks/head_passes.py` counts these bytes. The module `head` defines the letters in the shapes.
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

    The gradient for a target is 1 − p, where p is its probability. The caller computes it from the target's log-prob,
    because p can round to 1 in half precision.
    """
    probabilities = torch.exp(logps, out=torch.empty_like(logps, dtype=dtype))
    return probabilities.scatter_(1, targets.unsqueeze(1), 0)


def unit_gradient(logps: Tensor, at_targets: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Compute d logp_t / d hidden, `[C, H]`, for the targets t and transform.factor = 1.

    It is (1 − p_t) w_t − Σ_{v ≠ t} p_v w_v, where p_v is the probability of token v, and w_v its row of the weight.

    Args:
        logps: `[C, V]`. Log-probs of all tokens, in full precision.
        at_targets: `[C]`. Log-probs of the targets.
        targets: `[C]` int64. Targets.
        weight: `[V, H]`. Weight of the head.
    """
    others = probabilities_without_target(logps, targets, weight.dtype) @ weight
    return weight[targets] * -torch.expm1(at_targets).unsqueeze(1) - others
