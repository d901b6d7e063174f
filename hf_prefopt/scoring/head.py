"""Compute log-probs of tokens from hidden states of scored positions, in chunks of rows.

Only the logits of one chunk are in memory at a time, never those of a whole batch. Log-probs and statistics are in
fp32, or in float64 for a float64 model. The letters in shapes are: N scored tokens, C rows per chunk, H hidden size,
V vocabulary size. There are three implementations:

    frozen weight     The forward pass also computes the gradient d logp / d hidden, `[N, H]`, while the probabilities
                      are in memory. The backward pass only scales this gradient. Both passes together compute two
                      matrix products over the vocabulary. On a GPU, `FusedHeadLogps` needs fewer passes over the
                      logits.
    trained weight    The backward pass recomputes the logits of each chunk, and sums the weight's gradient in fp32.
    any other module  (such as a head with an adapter) is called per chunk under activation checkpointing.

If the KL to the reference is needed, every head uses the third implementation. Policy logits and reference logits of a
chunk are then in memory together, and are recomputed in the backward pass.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from hf_prefopt.scoring.fused_head import unit_gradient


@dataclass(frozen=True)
class LogitTransform:
    """The transformation of the logits z between the head and the softmax.

    It is cap · tanh(scale · z / cap) / temperature, or scale · z / temperature without a cap.

    Attributes:
        scale: Factor, such as Cohere's `logit_scale` or the inverse of Granite's `logits_scaling`.
        softcap: Cap, such as Gemma-2's `final_logit_softcapping`. `None` if there is no cap.
        temperature: Divisor of the scaled and capped logits.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the transformed logits (differentiable), or the same tensor if the transformation is the identity."""
        if self.softcap is not None:
            return torch.tanh(logits * (self.scale / self.softcap)) * (self.softcap / self.temperature)
        return logits if self.factor == 1.0 else logits * self.factor

    @property
    def factor(self) -> float:
        """The derivative d transformed / d z at z = 0; without a cap, the derivative everywhere."""
        return self.scale / self.temperature

    def relative_slope(self, transformed: Tensor) -> Tensor | None:
        """Return (d transformed / d z) / `factor`, computed from the transformed logits.

        Return `None` if there is no cap, because the result would always be 1.
        """
        if self.softcap is None:
            return None
        return 1 - (transformed * (self.temperature / self.softcap)).square()


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def entropy(logps: Tensor) -> Tensor:
    """Compute the entropy `[...]` (nats) of distributions given by log-probs `[..., V]`."""
    return -(logps.exp() * logps).sum(-1)


def vocabulary_kl(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """Compute KL(π_ref ‖ π) = Σ_v π_ref (log π_ref − log π), `[...]` in nats, from log-probs `[..., V]`.

    Raises:
        ValueError: the vocabulary sizes of policy and reference differ.
    """
    if logps.shape != reference_logps.shape:
        raise ValueError(
            "the KL between policy and reference needs the same vocabulary size, but the sizes are "
            f"{logps.shape[-1]:,} and {reference_logps.shape[-1]:,}: choose a reference whose head has the same "
            "vocabulary size as the policy's"
        )
    return (reference_logps.exp() * (reference_logps - logps)).sum(-1)


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    # Each function computes a statistic [C] from log-probs [C, V] in full precision.
    "entropy": entropy,
    "normalized_entropy": lambda logps: entropy(logps) / math.log(logps.shape[-1]),
    "log_sum_sq_probs": lambda logps: (2 * logps).logsumexp(-1),
}


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, out: Tensor) -> Tensor:
    """Compute transformed logits `[C, V]` in full precision.

    The matrix product is computed in the dtype of the inputs and written to `out`.
    """
    out = out[: len(hidden)]
    logits = torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)
    return transform(logits.to(full_precision(logits.dtype)))


def _softmax_at(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs `[C]` of the targets, and the softmax as numerators e^(z − max z) `[C, V]` and sums `[C, 1]`.

    This function overwrites the logits. It does not divide the numerators by the sums: later steps apply the division
    to smaller tensors, which saves a pass over the vocabulary.
    """
    at_targets = logits.gather(1, targets.unsqueeze(1))
    largest = logits.amax(-1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()
    sums = exponentials.sum(-1, keepdim=True)
    return (at_targets - largest - sums.log()).squeeze(1), exponentials, sums


def _minus_target(exponentials: Tensor, sums: Tensor, targets: Tensor, slope: Tensor | None) -> Tensor:
    """Return −(d logp_target / d z) · sums / transform.factor, `[C, V]`; overwrite the exponentials with it.

    Args:
        exponentials, sums: Results of `_softmax_at`.
        slope: Result of `LogitTransform.relative_slope`.
    """
    gradient = exponentials.scatter_add_(1, targets.unsqueeze(1), -sums)
    return gradient if slope is None else gradient.mul_(slope)


def _in_range(gradient: Tensor, sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a gradient that can be cast to `dtype`, and divisors `[C, 1]` by which the caller must still divide it.

    With fp16, the gradient is divided by the sums first, because the sums of a flat softmax over a large vocabulary can
    exceed 65,504, the maximum of fp16.
    """
    return (gradient.div_(sums), torch.ones_like(sums)) if dtype == torch.float16 else (gradient, sums)


class FrozenHeadLogps(torch.autograd.Function):
    """The log-probs of targets for a head with a frozen weight. The forward pass also computes d logp / d hidden."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, statistics, chunk_rows):
        """Return the log-probs `[N]`, then a tensor `[N]` for each name in `statistics`; see `linear_head_logps`."""
        unit_gradient = torch.empty_like(hidden)
        outputs, buffer = _outputs(hidden, statistics), _buffer(hidden, weight, chunk_rows)
        for rows in _chunks(len(targets), chunk_rows):
            logits = _logits(hidden[rows], weight, bias, transform, buffer)
            slope = transform.relative_slope(logits)
            exponentials, sums = _record(outputs, rows, logits, targets[rows], statistics)
            gradient = _minus_target(exponentials, sums, targets[rows], slope)
            gradient, divisors = _in_range(gradient, sums, weight.dtype)
            product = gradient.to(weight.dtype) @ weight
            unit_gradient[rows] = product * (-transform.factor / divisors)
        ctx.save_for_backward(unit_gradient)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable  # the gradients computed in the forward pass are constants for autograd
    def backward(ctx, grad_logps, *_):
        """Scale d logps / d hidden by the incoming gradient `[N]`."""
        (unit_gradient,) = ctx.saved_tensors
        return unit_gradient * grad_logps.unsqueeze(1).to(unit_gradient.dtype), *(None,) * 6


class FusedHeadLogps(FrozenHeadLogps):
    """`FrozenHeadLogps` with fewer passes over the logits.

    The forward pass computes d logp / d hidden only if a gradient is needed. The transform must not have a soft-cap.
    See `fused_head`.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, statistics, chunk_rows):
        """Compute the same outputs as `FrozenHeadLogps.forward`."""
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        outputs, buffer = _outputs(hidden, statistics), _buffer(hidden, weight, chunk_rows)
        for rows in _chunks(len(targets), chunk_rows):
            logits = _logits(hidden[rows], weight, bias, transform, buffer)
            logps = _record_fused(outputs, rows, logits, targets[rows], statistics)
            if gradient is not None:
                gradient[rows] = unit_gradient(logps, outputs[0][rows], targets[rows], weight) * transform.factor
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)


class TrainedHeadLogps(torch.autograd.Function):
    """The log-probs of targets for a head with a trained weight; the backward pass recomputes each chunk's logits."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, statistics, chunk_rows):
        """Compute the same outputs as `FrozenHeadLogps.forward`."""
        outputs, buffer = _outputs(hidden, statistics), _buffer(hidden, weight, chunk_rows)
        for rows in _chunks(len(targets), chunk_rows):
            logits = _logits(hidden[rows], weight, bias, transform, buffer)
            record = _record_fused if _fuses(hidden, transform) else _record
            record(outputs, rows, logits, targets[rows], statistics)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.transform, ctx.chunk_rows = transform, chunk_rows
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps, *_):
        """Compute the gradients of hidden, weight and bias. Those of weight and bias are summed in fp32 or float64."""
        hidden, weight, bias, targets = ctx.saved_tensors
        exact = full_precision(weight.dtype)
        buffer = _buffer(hidden, weight, ctx.chunk_rows)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=exact)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=exact)
        for rows in _chunks(len(targets), ctx.chunk_rows):
            logits = _logits(hidden[rows], weight, bias, ctx.transform, buffer)
            slope = ctx.transform.relative_slope(logits)
            _, exponentials, sums = _softmax_at(logits, targets[rows])
            gradient = _minus_target(exponentials, sums, targets[rows], slope)
            gradient, divisors = _in_range(gradient, sums, weight.dtype)
            # The factors of each row multiply tensors of width H, which are smaller than those of width V.
            factors = grad_logps[rows].unsqueeze(1) * (-ctx.transform.factor / divisors)
            if grad_bias is not None:
                grad_bias += gradient.T.mv(factors.squeeze(1))
            gradient = gradient.to(weight.dtype)
            grad_hidden[rows] = (gradient @ weight) * factors.to(weight.dtype)
            grad_weight += gradient.T @ (hidden[rows] * factors.to(hidden.dtype))
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None, None, None


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _outputs(hidden: Tensor, statistics: tuple[str, ...]) -> list[Tensor]:
    """Allocate buffers of shape `[N]`, in full precision, for the log-probs and for each statistic."""
    return [hidden.new_empty(len(hidden), dtype=full_precision(hidden.dtype)) for _ in (0, *statistics)]


def _buffer(hidden: Tensor, weight: Tensor, chunk_rows: int) -> Tensor:
    """Allocate one buffer for the logits of all chunks, because new memory for each chunk would be slow on a CPU."""
    return hidden.new_empty(min(chunk_rows, len(hidden)), len(weight))


def _record(
    outputs: list[Tensor], rows: slice, logits: Tensor, targets: Tensor, statistics: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Write a chunk's log-probs and statistics to the outputs; return the numerators and sums of `_softmax_at`."""
    if statistics:
        logps = logits.log_softmax(-1)
        for output, name in zip(outputs[1:], statistics, strict=True):
            output[rows] = STATISTICS[name](logps)
        del logps
    outputs[0][rows], exponentials, sums = _softmax_at(logits, targets)
    return exponentials, sums


def _record_fused(
    outputs: list[Tensor], rows: slice, logits: Tensor, targets: Tensor, statistics: tuple[str, ...]
) -> Tensor:
    """Write a chunk's log-probs and statistics to the outputs; return the log-probs `[C, V]` of all tokens."""
    logps = logits.log_softmax(-1)
    outputs[0][rows] = logps.gather(1, targets.unsqueeze(1)).squeeze(1)
    for output, name in zip(outputs[1:], statistics, strict=True):
        output[rows] = STATISTICS[name](logps)
    return logps


def _fuses(hidden: Tensor, transform: LogitTransform) -> bool:
    """Return True on a CUDA GPU if the logits have no soft-cap.

    The slope of a soft-cap would be another factor in each logit's gradient.
    """
    return hidden.is_cuda and transform.softcap is None


def linear_head_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform = LogitTransform(),
    statistics: tuple[str, ...] = (),
    chunk_rows: int = 512,
) -> tuple[Tensor, ...]:
    """Compute log-probs of `targets` under softmax(transform(hidden · weightᵀ + bias)), and statistics.

    Args:
        hidden: `[N, H]`. weight: `[V, H]`. bias: `[V]` or `None`. targets: `[N]` int64.
        transform: Transformation of the logits.
        statistics: Names in `STATISTICS`; the statistics have no gradient.
        chunk_rows: Number of rows per chunk.

    Returns:
        A tuple of `[N]` tensors, in fp32 or float64: the log-probs in nats, then each statistic.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    # Without gradients, TrainedHeadLogps only runs the plain forward pass.
    way = FrozenHeadLogps if hidden.requires_grad and torch.is_grad_enabled() and not trained else TrainedHeadLogps
    way = FusedHeadLogps if _fuses(hidden, transform) and not trained else way
    with torch.autocast(hidden.device.type, enabled=False):
        return way.apply(hidden, weight, bias, targets, transform, statistics, chunk_rows)


def module_head_logps(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    transform: LogitTransform = LogitTransform(),
    statistics: tuple[str, ...] = (),
    chunk_rows: int = 512,
    reference: Callable[[slice], Tensor] | None = None,
    least_chunks: int = 0,
) -> tuple[Tensor, ...]:
    """Compute the results of `linear_head_logps` for any callable head, such as a quantized head.

    Each chunk runs under activation checkpointing.

    Args:
        head: Function that maps hidden states `[C, H]` to logits `[C, V]`.
        reference: Function that maps a slice of rows to the reference's log-probs `[C, V]`, without gradient. If it is
            given, the KL to the reference, `[N]` with gradient, is returned after the statistics.
        least_chunks: Minimum number of chunks. If there are fewer, the head is also called on empty chunks.
    """

    def chunk(hidden_rows: Tensor, target_rows: Tensor, rows: slice) -> tuple[Tensor, ...]:
        logps = predictions(head, hidden_rows, transform)
        extra = [STATISTICS[name](logps.detach()) for name in statistics]
        divergence = [] if reference is None else [vocabulary_kl(logps, reference(rows))]
        return logps.gather(1, target_rows.unsqueeze(1)).squeeze(1), *extra, *divergence

    run = partial(checkpoint, chunk, use_reentrant=False) if torch.is_grad_enabled() else chunk
    chunks = _chunks(len(targets), chunk_rows)
    chunks += [slice(len(targets), None)] * (least_chunks - len(chunks))
    parts = [run(hidden[rows], targets[rows], rows) for rows in chunks]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def predictions(head: Callable[[Tensor], Tensor], hidden: Tensor, transform: LogitTransform) -> Tensor:
    """Compute the log-probs `[C, V]` of every token, in full precision."""
    logits = head(hidden)
    return transform(logits.to(full_precision(logits.dtype))).log_softmax(-1)


def is_plain_linear(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Return True if a head is exactly `nn.Linear`, so that it can be computed from its weight and bias."""
    return type(head) is nn.Linear
