"""Measure the effect of fused kernels and compiled layers on a LoRA step of `PreferenceTrainer`, on a CUDA machine.

    python -m benchmarks.gpu_levers --out DIR          # liger-kernel must be importable for its rows
    python -m benchmarks.gpu_levers --device cpu --tiny

Each variant has its own trainer on the same random weights: unchanged, with each decoder layer compiled
(`layer.compile(dynamic=True)`), with Liger's norms, rotary embeddings and SwiGLU, and with both. Liger replaces
functions for the whole process, so the variants with Liger come last.
"""

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_speed import GIB, Case, peak_of, seconds_of

CASES = [
    Case("0.5B", "4:1", torch.float32, 8),
    Case("8B", "4:1", torch.bfloat16, 2),
    Case("0.5B", "chat", torch.float32, 8),
]


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer in place, without changing its name, hooks and parameters."""
    for module in model.modules():
        if type(module).__name__.endswith("DecoderLayer"):
            module.compile(dynamic=True)


def put_liger_in(model: nn.Module) -> None:
    """Install Liger's kernels, as the Trainer does when training begins with `use_liger_kernel=True`."""
    from transformers.trainer import apply_liger_kernel

    apply_liger_kernel(model, {"fused_linear_cross_entropy": False})


def nothing(model: nn.Module) -> None:
    """Leave the model unchanged."""


def both(model: nn.Module) -> None:
    """Install Liger's kernels, then compile the layers."""
    put_liger_in(model)
    compile_layers(model)


VARIANTS: dict[str, Callable[[nn.Module], None]] = {
    "as it comes": nothing,
    "compiled layers": compile_layers,
    "liger": put_liger_in,
    "liger, compiled layers": both,
}


def measured(case: Case, variant: str, device: str, tiny: bool, rounds: int = 7) -> dict[str, Any]:
    """Return the median time of a step, the host's share, the peak memory and the loss of one variant."""
    from unittest.mock import patch

    from benchmarks import sides
    from benchmarks.shapes import SHAPES, random_model

    rows = case.rows(tiny)
    with patch.object(sides, "load_model", lambda _: random_model(case.shape, device, case.weights)):
        side = sides.our_side(
            f"random:vocab={SHAPES[case.shape].vocab}", bf16=device == "cuda", use_cpu=device == "cpu"
        )
    sides.perturb_adapters(side)
    VARIANTS[variant](side.trainer.model)
    start = time.perf_counter()
    loss = float(side.step(rows))
    for _ in range(2):
        side.step(rows)
    warm_up = time.perf_counter() - start
    peak = peak_of(lambda: side.step(rows), device)
    times = [seconds_of(lambda: side.step(rows), device) for _ in range(rounds)]
    host = []
    for _ in range(3):
        begin = time.perf_counter()
        side.step(rows)
        host.append(time.perf_counter() - begin)
        if device == "cuda":
            torch.cuda.synchronize()
    return {
        "ms": 1000 * statistics.median(times),
        "host ms": 1000 * statistics.median(host),
        "peak GiB": peak["allocated"],
        "loss": loss,
        "warm-up s": warm_up,
        "held GiB": torch.cuda.memory_allocated() / GIB if device == "cuda" else 0.0,
    }


def main() -> None:
    """Measure the variants case by case; print and write each result immediately."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--budget", type=float, default=150, help="seconds after which no more variants start")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [Case("tiny", "4:1", torch.float32, 2)] if options.tiny else CASES
    start, results = time.monotonic(), []
    for variant in options.variants:
        for case in cases:
            if time.monotonic() - start > options.budget:
                print(f"skipped, because the time budget is used up: {variant}, {case.names()}", flush=True)
                continue
            try:
                figures = measured(case, variant, options.device, options.tiny)
            except Exception as error:
                figures = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
                traceback.print_exc()
            torch._dynamo.reset()
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
            results.append({"variant": variant} | case.names() | figures)
            print(json.dumps(results[-1]), flush=True)
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"levers_{len(options.variants)}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
