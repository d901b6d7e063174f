"""Time alternating steps on a device: both trainers, or, without TRL, both layouts through the scoring functions."""

import gc
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.gpu_correctness import dpo_step, moved
from benchmarks.shapes import SHAPES, random_model
from benchmarks.work import Row, prepared, read_rows, shared_positions, synthetic
from hf_prefopt.data.layouts import PaddedCollator, SharedCollator
from hf_prefopt.scoring.attention import install_segment_attention
from hf_prefopt.scoring.forward import base_causal_lm, install_scoring

# Measured throughput of large bf16 products without sparsity. It is below the values of the data sheets.
REACHED_FLOP_PER_SECOND = {"H100": 790e12, "H200": 790e12, "A100": 270e12}
WARM_UP = 2
# Numbers of prompt and response tokens.
LENGTHS = {"1:1": (512, 512), "4:1": (1024, 256), "10:1": (2560, 256)}
TINY_LENGTHS = {"1:1": (16, 16), "4:1": (64, 16), "10:1": (160, 16)}
GIB = 1024**3


def seconds_of(step: Callable[[], Any], device: str) -> float:
    """Return the time of a step: from CUDA events on a GPU, from the process's CPU time on a CPU."""
    gc.collect()
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_of(step: Callable[[], Any], device: str) -> dict[str, float]:
    """Return the peaks of allocated and reserved memory during a step in GiB, including the model; empty on a CPU."""
    if device == "cpu":
        return {"allocated": 0.0, "reserved": 0.0}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    return {
        "allocated": torch.cuda.max_memory_allocated() / GIB,
        "reserved": torch.cuda.max_memory_reserved() / GIB,
    }


def in_turns(peer: Callable[[], Any], ours: Callable[[], Any], rounds: int, device: str, flop: float) -> dict[str, Any]:
    """Measure alternating steps of both sides; `flop` is the minimal FLOP of a step."""
    for _ in range(WARM_UP if device == "cuda" else 1):
        peer(), ours()
    figures: dict[str, Any] = {"peer": peak_of(peer, device), "ours": peak_of(ours, device)}
    figures["peer"]["seconds"], figures["ours"]["seconds"] = [], []
    for number in range(rounds):
        order = (("peer", peer), ("ours", ours))
        for name, step in order if number % 2 == 0 else reversed(order):
            figures[name]["seconds"].append(seconds_of(step, device))
    ratios = [a / b for a, b in zip(figures["peer"]["seconds"], figures["ours"]["seconds"], strict=True)]
    return figures | {
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "mfu": _mfu(flop, statistics.median(figures["ours"]["seconds"]), device),
    }


def _mfu(flop: float, seconds: float, device: str) -> float | None:
    if device == "cpu":
        return None
    name = torch.cuda.get_device_name()
    reached = next((speed for chip, speed in REACHED_FLOP_PER_SECOND.items() if chip in name), None)
    return None if reached is None else flop / seconds / reached


def least_flop(shape: str, rows: Sequence[Row]) -> float:
    """Return the minimal FLOP of a LoRA step on these rows with a live reference."""
    responses = [(len(row["prompt_ids"]), len(ids)) for row in rows for ids in row["response_ids"]]
    positions = shared_positions(rows)
    # In a sequence of n tokens, a position attends to n / 2 others on average.
    keys = sum(len(row["prompt_ids"]) ** 2 / 2 for row in rows) + sum(r * (p + r / 2) for p, r in responses)
    return SHAPES[shape].step_flop(positions, sum(r for _, r in responses), int(keys / positions))


@dataclass(frozen=True)
class Case:
    """A comparison: a shape from `SHAPES`, the lengths of the rows, the dtype of frozen weights, pairs per step."""

    shape: str
    lengths: str
    weights: torch.dtype
    pairs: int

    def rows(self, tiny: bool = False) -> Sequence[Row]:
        """Return the rows of a step, with random tokens."""
        vocabulary = SHAPES[self.shape].vocab
        if self.lengths == "chat":
            return chat_lengths(vocabulary, self.pairs)
        return synthetic(vocabulary, self.pairs, *(TINY_LENGTHS if tiny else LENGTHS)[self.lengths])[0]

    def names(self) -> dict[str, Any]:
        """The columns that identify the case in tables and files."""
        return {
            "shape": self.shape,
            "lengths": self.lengths,
            "weights": str(self.weights).removeprefix("torch."),
            "pairs": self.pairs,
        }


def chat_lengths(vocabulary: int, pairs: int) -> list[Row]:
    """Return a random batch with random tokens and the lengths of the chat pairs, in words and punctuation marks."""
    rng = random.Random(0)
    texts = rng.sample(read_rows("benchmarks/data/chat_pairs.jsonl.gz"), pairs)

    def tokens(messages: Sequence[dict[str, str]]) -> list[int]:
        count = sum(len(re.findall(r"\w+|[^\w\s]", message["content"])) + 5 for message in messages)
        return [rng.randrange(3, vocabulary) for _ in range(count)]

    return [
        prepared(tokens(text["prompt"]), [tokens(text["chosen"]), tokens(text["rejected"])], row)
        for row, text in enumerate(texts)
    ]


def layouts_in_turns(case: Case, rows: Sequence[Row], rounds: int, device: str) -> dict[str, Any]:
    """Compare "padded" (the peer) with "shared" on one model through the scoring functions, with an adapter."""
    from benchmarks.sides import lora

    model = get_peft_model(random_model(case.shape, device, case.weights), lora()).train()
    install_scoring(model)
    install_segment_attention(base_causal_lm(model))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5)
    batches = [moved(collate(rows), device) for collate in (PaddedCollator(0), SharedCollator())]

    def loss_of(batch: dict[str, Any]) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            return dpo_step(model, batch, backward=False)

    def step(batch: dict[str, Any]) -> None:
        loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    losses = [float(loss_of(batch).detach()) for batch in batches]
    flop = least_flop(case.shape, rows)
    figures = in_turns(*(partial(step, batch) for batch in batches), rounds, device, flop)
    return figures | {"loss_apart": abs(losses[0] - losses[1]) / abs(losses[0])}


def trainers_in_turns(
    case: Case, rows: Sequence[Row], rounds: int, device: str, adapt: Callable[[nn.Module], Any] = lambda model: None
) -> dict[str, Any]:
    """Compare TRL's trainer with `PreferenceTrainer`, with equal settings and separate models.

    Args:
        adapt: a function that modifies the model of each side before timing.
    """
    from benchmarks.paired import agreement

    peer, ours = both_trainers(case, device)
    for side in (peer, ours):
        adapt(side.trainer.model)
    same = agreement(peer, ours, rows)
    flop = least_flop(case.shape, rows)
    figures = in_turns(partial(peer.step, rows), partial(ours.step, rows), rounds, device, flop)
    figures |= {"loss_apart": same.loss, "gradients_apart": same.gradient}
    return figures | {"positions": [side.positions(rows) for side in (peer, ours)], "layout": ours.trainer.layout}


def both_trainers(case: Case, device: str) -> tuple[Any, Any]:
    """Return TRL's trainer and ours on shared random weights of a shape, with equal nonzero adapters."""
    from unittest.mock import patch

    from benchmarks import sides

    source = f"random:vocab={SHAPES[case.shape].vocab}"  # only for the tokenizer
    with patch.object(sides, "load_model", lambda _: random_model(case.shape, device, case.weights)):
        options = {"bf16": device == "cuda", "use_cpu": device == "cpu"}
        peer, ours = sides.trl_side(source, **options), sides.our_side(source, **options)
    sides.perturb_adapters(peer, ours)
    _share_frozen(peer.model, ours.model)
    return peer, ours


def _share_frozen(first: nn.Module, second: nn.Module) -> None:
    """Make two models share their equal frozen weights, so that the peak memory includes these weights only once."""
    frozen = {name: p for name, p in first.named_parameters() if not p.requires_grad}
    for name, parameter in second.named_parameters():
        if name in frozen:
            parameter.data = frozen[name].data
