"""The work and time of a step in each layout, for models whose token mixers cannot share a prompt.

    python -m benchmarks.layouts --pairs 8 --batches 3

The models are tiny and random, with the architectures of Qwen3.5, Nemotron-H, LFM2 and GPT-OSS. The batches have the
lengths of real chat pairs, with one token per four bytes of text, cut to `--longest` tokens per text. The script counts
the positions that norms and MLPs compute, and the FLOPs of matrix products in the forward and backward passes
(`torch.utils.flop_counter`, which does not see recurrences made of elementwise operations). In "whole mixers", the
projections of a mixer also run on padded sequences.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.work import Row, prepared, read_rows, shared_positions
from hf_prefopt.data.layouts import AroundCollator, PaddedCollator, SharedCollator
from hf_prefopt.scoring import around
from hf_prefopt.scoring.forward import install_scoring, score
from hf_prefopt.scoring.layout import settled_layout

VOCABULARY = 512
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Qwen3.5 has three mixers with a state for each attention layer; the others are small versions of the published models.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3.5": (
        "qwen3_5_text",
        {
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
    ),
    "Nemotron-H": (
        "nemotron_h",
        {
            "hybrid_override_pattern": "M-M*-",
            "num_hidden_layers": 5,
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "ssm_state_size": 32,
            "n_groups": 1,
            "chunk_size": 64,
        },
    ),
    "LFM2": ("lfm2", {"full_attn_idxs": [1, 3], "block_multiple_of": 64}),
    "GPT-OSS": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 128}),
}
PADDED = PaddedCollator(0)
LAYOUTS: dict[str, tuple[str, Callable, Callable[[], AbstractContextManager]]] = {
    "padded": ("padded", PADDED, nullcontext),
    "around, whole mixers": (
        "around",
        AroundCollator(PADDED),
        lambda: patch.object(around, "_is_linear", no_projection),
    ),
    "around": ("around", AroundCollator(PADDED), nullcontext),
    "shared": ("shared", SharedCollator(), nullcontext),
}


def no_projection(_: Any) -> bool:
    """No module is a projection."""
    return False


def chat_batches(pairs: int, batches: int, longest: int) -> list[list[Row]]:
    """Batches of pairs with the lengths of chat pairs and random tokens."""
    rng = random.Random(0)

    def tokens(text: str) -> list[int]:
        count = max(1, min(longest, len(text.encode()) // 4))
        return [rng.randrange(3, VOCABULARY) for _ in range(count)]

    def row(number: int, raw: dict[str, Any]) -> Row:
        prompt, chosen, rejected = (
            "\n".join(turn["content"] for turn in raw[name]) for name in ("prompt", "chosen", "rejected")
        )
        return prepared(tokens(prompt), [tokens(chosen), tokens(rejected)], number)

    raw = rng.sample(read_rows("benchmarks/data/chat_pairs.jsonl.gz"), pairs * batches)
    rows = [row(number, each) for number, each in enumerate(raw)]
    return [rows[start : start + pairs] for start in range(0, len(rows), pairs)]


def model_of(shape: str) -> PreTrainedModel:
    """A random model of that shape, in fp32 and training mode."""
    torch.manual_seed(0)
    model_type, settings = SHAPES[shape]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **settings}))
    model.set_experts_implementation("eager")  # the counter does not know their fused product
    install_scoring(model)
    return model.train()


def step(model: PreTrainedModel, batch: Any) -> None:
    """Forward and backward of the policy."""
    model.zero_grad()
    score(model, batch).logps.sum().backward()


def measured(shape: str, name: str, batches: Sequence[Sequence[Row]]) -> tuple[int, int, float] | None:
    """Positions and FLOPs of all batches, and the median time of a step; `None` if the layout is not exact."""
    layout, collate, context = LAYOUTS[name]
    model = model_of(shape)
    with context():
        try:
            settled_layout(layout, [model])
        except ValueError:
            return None
    laid_out = [collate(rows) for rows in batches]
    with FlopCounterMode(display=False) as flops:
        for batch in laid_out:
            step(model, batch)
    seconds = []
    for batch in laid_out:
        start = time.perf_counter()
        step(model, batch)
        seconds.append(time.perf_counter() - start)
    positions = sum(
        batch["input_ids"].numel() if layout == "padded" else shared_positions(rows)
        for rows, batch in zip(batches, laid_out, strict=True)
    )
    return positions, flops.get_total_flops(), statistics.median(seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="pairs per batch")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--longest", type=int, default=256, help="maximum tokens of a prompt or a response")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    batches = chat_batches(args.pairs, args.batches, args.longest)
    table = Table("shape", "layout", "positions", "GFLOP", "of padded", "s a step", "of padded")
    for shape in args.shapes:
        whole: tuple[int, int, float] | None = None
        for name in LAYOUTS:
            found = measured(shape, name, batches)
            if found is None:
                table.add_row(shape, name, "not exact for it")
                continue
            whole = whole or found
            positions, flops, seconds = found
            shares = [f"{flops / whole[1]:.2f}", f"{seconds:.2f}", f"{seconds / whole[2]:.2f}"]
            table.add_row(shape, name, f"{positions:,}", f"{flops / 1e9:.1f}", *shares)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
