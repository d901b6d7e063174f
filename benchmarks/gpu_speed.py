"""Timed in turns on a device: both layouts through the scoring functions, or both trainers where TRL is there."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from benchmarks.gpu_correctness import dpo_step, moved
from benchmarks.shapes import SHAPES, random_model
from benchmarks.work import Row, shared_positions, synthetic
from hf_prefopt.data.collate import PaddedCollator
from hf_prefopt.data.shared import SharedCollator
from hf_prefopt.scoring.attention import install_segment_attention
from hf_prefopt.scoring.forward import base_causal_lm, install_scoring

# bf16 products without sparsity, as large ones were measured to reach and not as data sheets have it.
REACHED_FLOP_PER_SECOND = {"H100": 790e12, "H200": 790e12, "A100": 270e12}
WARM_UP = 2
GIB = 1024**3


def seconds_of(step: Callable[[], Any], device: str) -> float:
    """The time of a step: by events on a GPU, the process's CPU time on a CPU."""
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
    """GiB allocated and reserved at most during a step, model included; nothing on a CPU."""
    if device == "cpu":
        return {"allocated": 0.0, "reserved": 0.0}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    return {
        "allocated": torch.cuda.max_memory_allocated() / GIB,
        "reserved": torch.cuda.max_memory_reserved() / GIB,
    }


def in_turns(
    peer: Callable[[], Any], ours: Callable[[], Any], rounds: int, device: str, flop: float, losses: Sequence[float]
) -> dict[str, Any]:
    """Both steps measured in turns; `losses` are those of both sides before the first step."""
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
        "loss_apart": abs(losses[0] - losses[1]) / abs(losses[0]),
    }


def _mfu(flop: float, seconds: float, device: str) -> float | None:
    if device == "cpu":
        return None
    name = torch.cuda.get_device_name()
    reached = next((speed for chip, speed in REACHED_FLOP_PER_SECOND.items() if chip in name), None)
    return None if reached is None else flop / seconds / reached


def least_flop(shape: str, rows: Sequence[Row]) -> float:
    """The fewest FLOP of a LoRA step on these rows with a live reference."""
    prompt, response = len(rows[0]["prompt_ids"]), len(rows[0]["response_ids"][0])
    scored = sum(len(ids) for row in rows for ids in row["response_ids"])
    return SHAPES[shape].step_flop(shared_positions(rows), scored, (prompt + response) // 2)


def layouts_in_turns(shape: str, prompt: int, response: int, pairs: int, rounds: int, device: str) -> dict[str, Any]:
    """ "padded" (the peer) against "shared", one model, through the scoring functions, with AdamW on the adapter."""
    from benchmarks.sides import lora

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = get_peft_model(random_model(shape, device, dtype), lora()).train()
    install_scoring(model)
    install_segment_attention(base_causal_lm(model))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5)
    rows = synthetic(SHAPES[shape].vocab, pairs, prompt, response)[0]
    batches = [moved(collate(rows), device) for collate in (PaddedCollator(0), SharedCollator())]

    def loss_of(batch: dict[str, Any]) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            return dpo_step(model, batch, backward=False)

    def step(batch: dict[str, Any]) -> None:
        loss_of(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    losses = [float(loss_of(batch).detach()) for batch in batches]
    return in_turns(*(partial(step, batch) for batch in batches), rounds, device, least_flop(shape, rows), losses)


def trainers_in_turns(shape: str, prompt: int, response: int, pairs: int, rounds: int, device: str) -> dict[str, Any]:
    """TRL's trainer against `PreferenceTrainer`, each at equal settings with a model of its own."""
    from unittest.mock import patch

    from benchmarks import sides

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    source = f"random:vocab={SHAPES[shape].vocab}"  # names the tokenizer; the weights are those of the shape
    with patch.object(sides, "load_model", lambda _: random_model(shape, device, dtype)):
        options = {"bf16": device == "cuda", "use_cpu": device == "cpu"}
        peer, ours = sides.trl_side(source, **options), sides.our_side(source, **options)
    sides.perturb_adapters(peer, ours)
    _share_frozen(peer.model, ours.model)
    rows = synthetic(SHAPES[shape].vocab, pairs, prompt, response)[0]
    losses = [side.backward(rows) for side in (peer, ours)]
    for side in (peer, ours):
        side.model.zero_grad()
    return in_turns(partial(peer.step, rows), partial(ours.step, rows), rounds, device, least_flop(shape, rows), losses)


def _share_frozen(first: nn.Module, second: nn.Module) -> None:
    """Let two models of equal frozen weights have them in memory once, so that a peak counts them once."""
    frozen = {name: p for name, p in first.named_parameters() if not p.requires_grad}
    for name, parameter in second.named_parameters():
        if name in frozen:
            parameter.data = frozen[name].data


def pairs_that_fit(shape: str, prompt: int, response: int, most: int = 8, gib: float = 40) -> int:
    """Pairs a step of which the padded layout's activations, kept without checkpointing, take about so many GiB."""
    sizes = SHAPES[shape]
    per_position = sizes.layers * 2 * (14 * sizes.hidden + 6 * sizes.mlp)
    return max(1, min(most, int(gib * GIB / (per_position * 2 * (prompt + response)))))
