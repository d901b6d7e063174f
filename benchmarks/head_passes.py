"""The number of passes of the log-prob head over its logits on a GPU: ours, TRL's, and one with fewer passes.

    python -m benchmarks.head_passes

The passes are counted on fake tensors, as in `benchmarks.roofline`. The head with fewer passes uses kernels that CUDA
fuses: a half-precision product with fp32 output, a log-softmax, and an exponential that reads fp32 and writes half
precision. (PyTorch's log-softmax with dtype=torch.float32 is a single kernel only for fp16; bf16 is first copied to
fp32.) It is a proposal for heads with frozen weights; the trainer does not use it.
"""

from benchmarks.roofline.fake_device import fake_gpu, load_device

if __name__ == "__main__":
    load_device()

from collections import Counter
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.roofline.counting import Batch, Counting, Work
from benchmarks.roofline.estimate import seconds
from benchmarks.roofline.kernels import cuda_kernels
from hf_prefopt.scoring.head import linear_head_logps

# Qwen3-4B's head, and the scored tokens of 8 pairs with responses of 256 tokens.
VOCABULARY, HIDDEN, TOKENS = 151_936, 2560, 4096
# Per logit of a chunk: logits and log-probs in fp32, and the gradient in half precision.
BYTES_A_LOGIT = 10
TRL_TILE = 32_768


def rows_of(budget: int, vocabulary: int) -> int:
    """Rows of logits that fit a budget of bytes."""
    return max(1, budget // (BYTES_A_LOGIT * vocabulary))


class FewerPasses(torch.autograd.Function):
    """Log-probs of targets under a frozen head, and unit gradients from the forward pass if they are needed."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int) -> Tensor:
        """(hidden `[N, H]`, weight `[V, H]`, targets `[N]`) → `[N]` in fp32."""
        with_gradient = ctx.needs_input_grad[0]
        unit_gradient = torch.empty_like(hidden) if with_gradient else None
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, min(start + chunk_rows, len(hidden)))
            columns = targets[rows].unsqueeze(1)
            all_logps = wide_product(hidden[rows], weight.T).log_softmax(-1)
            logps[rows] = all_logps.gather(1, columns).squeeze(1)
            if unit_gradient is not None:
                probabilities = torch.exp(all_logps, out=torch.empty_like(all_logps, dtype=weight.dtype))
                probabilities.scatter_add_(1, columns, torch.full_like(columns, -1, dtype=weight.dtype))
                torch.mm(probabilities, weight, out=unit_gradient[rows])
        if unit_gradient is not None:
            ctx.save_for_backward(unit_gradient)
        return logps

    @staticmethod
    def backward(ctx, grad_logps: Tensor):
        """d logps / d hidden, scaled by the incoming gradient `[N]`; the kept gradient has the opposite sign."""
        (unit_gradient,) = ctx.saved_tensors
        return unit_gradient * -grad_logps.unsqueeze(1).to(unit_gradient.dtype), None, None, None


def wide_product(first: Tensor, second: Tensor) -> Tensor:
    """The product in fp32; of half precision on CUDA by one kernel, which rounds nothing to half precision."""
    if first.is_cuda and first.element_size() == 2:
        return torch.mm(first, second, out_dtype=torch.float32)
    return (first @ second).float()


def heads() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The heads that are compared, by name."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    fewer = rows_of(512 << 20, VOCABULARY)
    statistics = ("entropy", "mean_logits", "is_top1")  # TRL computes these in every step
    return {
        "ours, 2048 rows": lambda h, w, t: linear_head_logps(h, w, None, t, chunk_rows=2048)[0],
        "ours, 512 rows": lambda h, w, t: linear_head_logps(h, w, None, t, chunk_rows=512)[0],
        "TRL's": lambda h, w, t: ChunkedLogProbFunction.apply(h, w, None, t, 1.0, TRL_TILE, None, 1.0, statistics)[0],
        f"fewer passes, {fewer} rows": lambda h, w, t: FewerPasses.apply(h, w, t, fewer),
        "fewer passes, 2048 rows": lambda h, w, t: FewerPasses.apply(h, w, t, 2048),
    }


def counted(head: Callable[[Tensor, Tensor, Tensor], Tensor], with_gradient: bool) -> tuple[list[Work], int]:
    """The work of a head's forward pass, and of its backward pass if there is one; the bytes in use."""
    counting = Counting({VOCABULARY, VOCABULARY % TRL_TILE, TRL_TILE}, None)
    with fake_gpu(), cuda_kernels(counting), counting, torch.set_grad_enabled(with_gradient):
        device = {"device": "cuda", "dtype": torch.bfloat16}
        hidden = torch.empty(TOKENS, HIDDEN, **device, requires_grad=with_gradient)
        weight = torch.empty(VOCABULARY, HIDDEN, **device)
        targets = torch.empty(TOKENS, device="cuda", dtype=torch.long)
        counting.begin(Batch())
        before = counting.memory
        logps = head(hidden, weight, targets)
        if with_gradient:
            logps.sum().backward()
        return counting.work, counting.peak - before


def main() -> None:
    """Print the table."""
    title = f"head of [{VOCABULARY:,}, {HIDDEN}], {TOKENS:,} tokens, bf16"
    table = Table("", title=title, title_justify="left")
    for column in ("gradient", "TFLOP", "GB moved", "of products", "launches", "estimated ms", "GiB in use"):
        table.add_column(column, justify="right")
    for with_gradient in (True, False):
        for name, head in heads().items():
            work, in_use = counted(head, with_gradient)
            bytes_of: Counter[str] = Counter()
            for each in work:
                bytes_of["products" if each.flop else "passes"] += each.bytes
            figures = (
                sum(w.flop for w in work) / 1e12,
                bytes_of.total() / 1e9,
                bytes_of["products"] / 1e9,
                sum(w.launches for w in work),
                1000 * sum(map(seconds, work)),
                in_use / 1024**3,
            )
            table.add_row(name, "yes" if with_gradient else "no", *(f"{x:,.1f}" for x in figures))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
