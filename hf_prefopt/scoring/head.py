"""The log-prob head: from hidden states of scored positions to the log-probs of their tokens, in chunks of rows.

The full logits of a batch are never held, only those of one chunk, and their statistics are fp32. Shapes: N scored
tokens, C rows of a chunk, H hidden size, V vocabulary. Three ways of one function, by what must be differentiated:

    frozen weight     the gradient d logp / d hidden is made in the forward, where the probabilities are at hand, kept
                      as `[N, H]` and scaled by the incoming gradient: two products over the vocabulary in all.
    trained weight    the backward makes the logits again, chunk by chunk, and sums the weight's gradient in fp32.
    any other module  (an adapter on the head) is called by chunk under activation checkpointing.

So is any head where the KL to the reference's predictions is asked for: both models' logits of a chunk are then held at
once, and made again in the backward.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to z = W·h before its softmax: cap · tanh(scale · z / cap) / temperature.

    Attributes:
        scale: a factor (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: a cap (Gemma-2's `final_logit_softcapping`), or `None` for none.
        temperature: divides the result.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """The transformed logits, differentiable; untouched where there is nothing to do, for each pass costs."""
        if self.softcap is not None:
            return torch.tanh(logits * (self.scale / self.softcap)) * (self.softcap / self.temperature)
        return logits if self.factor == 1.0 else logits * self.factor

    @property
    def factor(self) -> float:
        """d transformed / d z at z = 0, and everywhere where there is no cap."""
        return self.scale / self.temperature

    def relative_slope(self, transformed: Tensor) -> Tensor | None:
        """d transformed / d z divided by `factor`, from the transformed logits; `None` where it is 1 everywhere."""
        if self.softcap is None:
            return None
        return 1 - (transformed * (self.temperature / self.softcap)).square()


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """fp32, or float64 where the tensor is that already."""
    return torch.promote_types(dtype, torch.float32)


def entropy(logps: Tensor) -> Tensor:
    """`[...]`: the entropy (nats) of distributions given by their log-probs `[..., V]`."""
    return -(logps.exp() * logps).sum(-1)


def vocabulary_kl(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """`[...]`: KL(π_ref ‖ π) = Σ_v π_ref (log π_ref − log π) (nats) of log-probs `[..., V]`.

    Raises:
        ValueError: the two have different vocabularies.
    """
    if logps.shape != reference_logps.shape:
        raise ValueError(
            f"the KL of policy and reference is over one vocabulary, and theirs have {logps.shape[-1]:,} and "
            f"{reference_logps.shape[-1]:,} tokens: choose a reference whose head is as wide as the policy's"
        )
    return (reference_logps.exp() * (reference_logps - logps)).sum(-1)


STATISTICS: dict[str, Callable[[Tensor], Tensor]] = {
    # All take log-probs [C, V] in full precision and give [C].
    "entropy": entropy,
    "normalized_entropy": lambda logps: entropy(logps) / math.log(logps.shape[-1]),
    "log_sum_sq_probs": lambda logps: (2 * logps).logsumexp(-1),
}


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform, out: Tensor) -> Tensor:
    """Transformed logits `[C, V]` in full precision; the product runs in the inputs' dtype, and is written to `out`."""
    out = out[: len(hidden)]
    logits = torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)
    return transform(logits.to(full_precision(logits.dtype)))


def _softmax_at(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs `[C]` of the targets, and the softmax as e^(z − max z) `[C, V]` over its sums `[C, 1]`.

    Overwrites the logits, and leaves the division to where the vocabulary is summed over: each pass over it costs.
    """
    at_targets = logits.gather(1, targets.unsqueeze(1))
    largest = logits.amax(-1, keepdim=True)
    exponentials = logits.sub_(largest).exp_()
    sums = exponentials.sum(-1, keepdim=True)
    return (at_targets - largest - sums.log()).squeeze(1), exponentials, sums


def _minus_target(exponentials: Tensor, sums: Tensor, targets: Tensor, slope: Tensor | None) -> Tensor:
    """−d logp_target / d z `[C, V]`, but for `transform.factor` and times `sums`; overwrites the exponentials."""
    gradient = exponentials.scatter_add_(1, targets.unsqueeze(1), -sums)
    return gradient if slope is None else gradient.mul_(slope)


def _in_range(gradient: Tensor, sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A gradient that can be cast to the products' dtype, and what it must still be divided by, `[C, 1]`.

    The sums of a flat softmax over a large vocabulary pass 65,504, where fp16 ends: there it is divided at once.
    """
    return (gradient.div_(sums), torch.ones_like(sums)) if dtype == torch.float16 else (gradient, sums)


class FrozenHeadLogps(torch.autograd.Function):
    """Log-probs of targets under a head whose weight takes no gradient: unit gradients made in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, statistics, chunk_rows):
        """(hidden `[N, H]`, weight `[V, H]`, targets `[N]`) → (logps `[N]`, one `[N]` per name in `statistics`)."""
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
    def backward(ctx, grad_logps, *_):
        """d logps / d hidden, scaled by the incoming gradient `[N]`."""
        (unit_gradient,) = ctx.saved_tensors
        return unit_gradient * grad_logps.unsqueeze(1).to(unit_gradient.dtype), *(None,) * 6


class TrainedHeadLogps(torch.autograd.Function):
    """Log-probs of targets under a head that trains: the backward makes each chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, transform, statistics, chunk_rows):
        """As `FrozenHeadLogps.forward`."""
        outputs, buffer = _outputs(hidden, statistics), _buffer(hidden, weight, chunk_rows)
        for rows in _chunks(len(targets), chunk_rows):
            logits = _logits(hidden[rows], weight, bias, transform, buffer)
            _record(outputs, rows, logits, targets[rows], statistics)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.transform, ctx.chunk_rows = transform, chunk_rows
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_logps, *_):
        """Gradients of hidden, weight and bias; the latter two summed in full precision over the chunks."""
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
            # The factors of a row go to the narrow side of each product.
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
    """Room for the log-probs and each statistic, `[N]` in full precision."""
    return [hidden.new_empty(len(hidden), dtype=full_precision(hidden.dtype)) for _ in (0, *statistics)]


def _buffer(hidden: Tensor, weight: Tensor, chunk_rows: int) -> Tensor:
    """Room for one chunk's logits, which all chunks use: on the CPU fresh memory costs a fault for each page."""
    return hidden.new_empty(min(chunk_rows, len(hidden)), len(weight))


def _record(
    outputs: list[Tensor], rows: slice, logits: Tensor, targets: Tensor, statistics: tuple[str, ...]
) -> tuple[Tensor, Tensor]:
    """Write a chunk's log-probs and statistics into the rows of the outputs; the softmax, see `_softmax_at`."""
    if statistics:
        logps = logits.log_softmax(-1)
        for output, name in zip(outputs[1:], statistics, strict=True):
            output[rows] = STATISTICS[name](logps)
        del logps
    outputs[0][rows], exponentials, sums = _softmax_at(logits, targets)
    return exponentials, sums


def linear_head_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform = LogitTransform(),
    statistics: tuple[str, ...] = (),
    chunk_rows: int = 512,
) -> tuple[Tensor, ...]:
    """Log-probs of `targets` under softmax(transform(hidden · weightᵀ + bias)), and statistics of that distribution.

    Args:
        hidden: `[N, H]`. weight: `[V, H]`. bias: `[V]` or `None`. targets: `[N]`.
        statistics: names of `STATISTICS`, not differentiated.
        chunk_rows: rows whose logits are held at once.

    Returns:
        (`[N]` log-probs in nats, then `[N]` for each statistic), in fp32 or float64.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = (t if t is None else t.to(dtype) for t in (hidden, weight, bias))
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    # Without gradients the trained way is the plain forward.
    way = FrozenHeadLogps if hidden.requires_grad and torch.is_grad_enabled() and not trained else TrainedHeadLogps
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
    """`linear_head_logps` for any callable head (an adapter on it, a quantized one), checkpointed by chunk.

    Args:
        reference: the reference's log-probs `[C, V]` of some of the rows, without gradient; the KL to them, which is
            differentiated, `[N]`, then stands behind the statistics.
        least_chunks: empty chunks follow until there are as many.
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
    """`[C, V]`: the log-probs of every token, in full precision."""
    logits = head(hidden)
    return transform(logits.to(full_precision(logits.dtype))).log_softmax(-1)


def is_plain_linear(head: nn.Module) -> bool:
    """Whether a head is nothing but its weight and bias, so that the product may be written out."""
    return type(head) is nn.Linear
