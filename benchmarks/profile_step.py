"""The parts of a step's time: policy, reference, their heads, the backward pass, and everything outside the model.

    python -m benchmarks.profile_step --case gsm8k --operators

Hooks on the model's body and head, and a wrapper around the backward pass, time the parts. The rest of the step is the
trainer's overhead (collating, objective, metrics, switching the adapter); clipping and optimizer are separate. For
comparison, the table shows a lower bound: the necessary products at the speed of one large product.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.cases import CASES
from benchmarks.compare import MODEL
from benchmarks.products import product_speed
from benchmarks.sides import Side, our_side, perturb_adapters, trl_side
from benchmarks.work import Row, shared_positions
from hf_prefopt.scoring.forward import base_causal_lm

PARTS = (
    "policy body",
    "policy head",
    "reference body",
    "reference head",
    "backward",
    "clipping",
    "optimizer",
    "collating",
    "other overhead",
)


@contextmanager
def timed_parts(side: Side, seconds: Counter) -> Iterator[None]:
    """Add the CPU time of each part of the steps inside the context to `seconds`."""
    causal_lm = base_causal_lm(side.model)
    head = causal_lm.get_output_embeddings()
    accelerator, trainer = side.trainer.accelerator, side.trainer
    handles = [
        *_hooks(causal_lm.base_model, "body", seconds),
        *_hooks(head, "head", seconds),
    ]
    with (
        patch.object(accelerator, "backward", _timed(accelerator.backward, "backward", seconds)),
        patch.object(accelerator, "clip_grad_norm_", _timed(accelerator.clip_grad_norm_, "clipping", seconds)),
        patch.object(side.optimizer, "step", _timed(side.optimizer.step, "optimizer", seconds)),
        patch.object(type(trainer.data_collator), "__call__", _timed(_collate(trainer), "collating", seconds)),
    ):
        yield
    for handle in handles:
        handle.remove()


def _collate(trainer: Any) -> Callable:
    return type(trainer.data_collator).__call__


def _hooks(module: nn.Module, part: str, seconds: Counter) -> list[Any]:
    """Forward hooks that assign calls with gradients to the policy and calls without to the reference."""
    started = []

    def before(*_: Any) -> None:
        started.append(time.process_time())

    def after(*_: Any) -> None:
        who = "policy" if torch.is_grad_enabled() else "reference"
        seconds[f"{who} {part}"] += time.process_time() - started.pop()

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _timed(function: Callable, part: str, seconds: Counter) -> Callable:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] += time.process_time() - start

    return timed


def profile(side: Side, batches: Sequence[Sequence[Row]]) -> dict[str, float]:
    """CPU seconds of each part, summed over a step on each of the batches; "step" is the whole."""
    side.step(batches[0])
    seconds: Counter = Counter(dict.fromkeys(PARTS, 0.0))
    with timed_parts(side, seconds):
        start = time.process_time()
        for rows in batches:
            side.step(rows)
        whole = time.process_time() - start
    seconds["other overhead"] = whole - sum(seconds.values())
    return {**seconds, "step": whole}


def floor(side: Side, batches: Sequence[Sequence[Row]]) -> dict[str, float]:
    """The FLOP of the products that an exact step needs, and their seconds at the speed of a large product.

    Body: forward, backward to the activations, reference forward. Head, at the scored positions: forward and unit
        gradient, reference forward. The products of attention and of the adapter are not included.
    """
    causal_lm = base_causal_lm(side.model)
    weights = [m.base_layer.weight if hasattr(m, "base_layer") else m.weight for m in _linears(causal_lm.base_model)]
    body = sum(weight.numel() for weight in weights)
    head = causal_lm.get_output_embeddings().weight.numel()
    positions = sum(shared_positions(rows) for rows in batches)
    scored = sum(len(response) for rows in batches for row in rows for response in row["response_ids"])
    flop = 3 * 2 * (body * positions + head * scored)
    speed = product_speed(causal_lm)
    return {"flop": flop, "flop_per_second": speed, "seconds": flop / speed}


def _linears(module: nn.Module) -> list[nn.Module]:
    """The linear layers of the body, each once; for a LoRA layer, not the layers inside it."""
    found = []
    for child in module.children():
        found += [child] if isinstance(child, nn.Linear) or hasattr(child, "base_layer") else _linears(child)
    return found


def operators(side: Side, rows: Sequence[Row], limit: int = 20) -> str:
    """The operators of a step by self time, from torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        side.step(rows)
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=limit, max_name_column_width=50)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Profile steps of one case and print the time of each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--case", default="gsm8k", choices=list(CASES))
    parser.add_argument("--side", default="ours", choices=("ours", "trl"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--operators", action="store_true", help="also print the table of torch's profiler")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    peer = trl_side(options.model)
    work = CASES[options.case](peer, options.model)
    side = our_side(options.model) if options.side == "ours" else peer
    perturb_adapters(side)
    batches = [work.batch(number) for number in range(options.steps)]
    seconds, least = profile(side, batches), floor(side, batches)

    table = Table(title=f"{work.name}, {options.side}: CPU seconds a step", title_justify="left")
    for column in ("part", "seconds", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in (*PARTS, "step"):
        table.add_row(part, f"{seconds[part] / len(batches):.3f}", f"{seconds[part] / seconds['step']:.1%}")
    overhead = (seconds["collating"] + seconds["other overhead"]) / seconds["step"]
    table.add_row("trainer overhead (collating + other)", "", f"{overhead:.2%}")
    table.add_row("floor: the products alone", f"{least['seconds'] / len(batches):.3f}", "")
    Console(width=120).print(table)
    if options.operators:
        print(operators(side, batches[0]))
    results = {"case": work.name, "seconds": seconds, "floor": least, "overhead": overhead}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
