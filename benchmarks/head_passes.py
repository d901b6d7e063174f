"""Count how often the log-prob head moves its logits on a GPU: our head for GPUs, TRL's head, and our head for CPUs.

    python -m benchmarks.head_passes

The passes are counted on fake tensors, as in `benchmarks.roofline`. Our head for GPUs is `scoring/fused_head.py`. On a
CPU, and for models with a soft-cap, the logits are overwritten in place instead, which takes more passes.
"""

from benchmarks.roofline.fake_device import fake_gpu, load_device

if __name__ == "__main__":
    load_device()

from collections import Counter
from collections.abc import Callable
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.roofline.counting import Batch, Counting, Work
from benchmarks.roofline.estimate import seconds
from benchmarks.roofline.kernels import cuda_kernels
from hf_prefopt.scoring import head
from hf_prefopt.scoring.fused_head import chunk_rows
from hf_prefopt.scoring.head import FrozenHeadLogps, LogitTransform, TrainedHeadLogps, linear_head_logps

# The size of Qwen3-4B's head, and the scored tokens of 8 pairs with responses of 256 tokens.
VOCABULARY, HIDDEN, TOKENS = 151_936, 2560, 4096
TRL_TILE = 32_768


def heads() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Return the heads that are compared, keyed by name."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def in_place(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        way = FrozenHeadLogps if h.requires_grad else TrainedHeadLogps
        with patch.object(head, "_fuses", lambda *_: False):
            return way.apply(h, w, None, t, LogitTransform(), (), 2048)[0]

    rows = chunk_rows(VOCABULARY)
    statistics = ("entropy", "mean_logits", "is_top1")  # TRL computes these statistics in every step
    return {
        f"ours, {rows} rows": lambda h, w, t: linear_head_logps(h, w, None, t, chunk_rows=rows)[0],
        "ours, 2048 rows": lambda h, w, t: linear_head_logps(h, w, None, t, chunk_rows=2048)[0],
        "in place, 2048 rows": in_place,
        "TRL's": lambda h, w, t: ChunkedLogProbFunction.apply(h, w, None, t, 1.0, TRL_TILE, None, 1.0, statistics)[0],
    }


def counted(scored: Callable[[Tensor, Tensor, Tensor], Tensor], with_gradient: bool) -> tuple[list[Work], int]:
    """Return the work of a head's forward pass, and of its backward pass if there is one, and the bytes in use."""
    counting = Counting({VOCABULARY, VOCABULARY % TRL_TILE, TRL_TILE}, None)
    with fake_gpu(), cuda_kernels(counting), counting, torch.set_grad_enabled(with_gradient):
        device = {"device": "cuda", "dtype": torch.bfloat16}
        hidden = torch.empty(TOKENS, HIDDEN, **device, requires_grad=with_gradient)
        weight = torch.empty(VOCABULARY, HIDDEN, **device)
        targets = torch.empty(TOKENS, device="cuda", dtype=torch.long)
        counting.begin(Batch())
        before = counting.memory
        logps = scored(hidden, weight, targets)
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
        for name, scored in heads().items():
            work, in_use = counted(scored, with_gradient)
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
