"""Measure Python's time for a micro-batch on a CPU, without the model's own forward and backward passes.

    python -m benchmarks.host_time --profile

The model has tiny weights, but as many modules and parameters as a 0.5B model with LoRA on all linear layers. The
measured code runs before the GPU gets its next kernel, so its time is lost whenever the GPU waits for Python.
"""

import argparse
import cProfile
import pstats
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.sides import Side, our_side, perturb_adapters, trl_side
from benchmarks.work import synthetic

MODEL = "random:hidden=64,mlp=128,layers=24,heads=4,key_heads=2,vocab=512"
# The model's own work, and work that a step does only once for all micro-batches.
MODEL_PARTS = ("policy forward", "reference forward", "backward")
STEP_PARTS = ("collating, counting", "clipping", "optimizer", "zero_grad")
HOST = "micro-batch: all else"


class Clock:
    """A clock that adds up CPU seconds by part; an optional profiler runs only outside the model's own parts."""

    def __init__(self, profiler: cProfile.Profile | None = None):
        self.seconds: Counter = Counter()
        self._profiler = profiler

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time spent inside the context to a part."""
        pauses = self._profiler if part in MODEL_PARTS else None
        if pauses:
            pauses.disable()
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds[part] += time.process_time() - start
            if pauses:
                pauses.enable()

    def around(self, function: Callable, part: Callable[[], str] | str) -> Callable:
        """Return a function that runs `function` and adds its time to a part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timed(part if isinstance(part, str) else part()):
                return function(*args, **kwargs)

        return timed


def _whose() -> str:
    return "policy forward" if torch.is_grad_enabled() else "reference forward"


def _freeing(backward: Callable) -> Callable:
    """Run the backward pass, including the time to free the graph."""

    def freeing(loss: torch.Tensor, **options: Any) -> None:
        backward(loss, **options)
        loss.detach_()

    return freeing


def step(side: Side, rows: list, clock: Clock) -> None:
    """Take a step of one micro-batch and time its parts."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(side.model, "forward", clock.around(side.model.forward, _whose)))
        for owner, name, part in (
            (side.trainer, "get_batch_samples", "collating, counting"),
            (side.trainer.accelerator, "clip_grad_norm_", "clipping"),
            (side.optimizer, "step", "optimizer"),
            (side.model, "zero_grad", "zero_grad"),
        ):
            stack.enter_context(patch.object(owner, name, clock.around(getattr(owner, name), part)))
        accelerator = side.trainer.accelerator
        freeing = clock.around(_freeing(accelerator.backward), "backward")
        stack.enter_context(patch.object(accelerator, "backward", freeing))
        start = time.process_time()
        side.step(rows)
        whole = time.process_time() - start
    clock.seconds[HOST] = whole - sum(clock.seconds.values())


def host_milliseconds(side: Side, rows: list, steps: int) -> dict[str, float]:
    """Return the minimal CPU milliseconds of each part over some steps. Other processes can only add to the time."""
    found: dict[str, list[float]] = {part: [] for part in (*MODEL_PARTS, *STEP_PARTS, HOST)}
    for _ in range(steps):
        step(side, rows, clock := Clock())
        for part, times in found.items():
            times.append(1000 * clock.seconds[part])
    return {part: min(times) for part, times in found.items()}


def profile(side: Side, rows: list, steps: int) -> cProfile.Profile:
    """Return the time of Python functions outside the model's own forward and backward passes."""
    profiler = cProfile.Profile()
    clock = Clock(profiler)
    for _ in range(steps):
        profiler.enable()
        step(side, rows, clock)
        profiler.disable()
    return profiler


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Print the table and, with `--profile`, the functions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", default="ours", choices=("ours", "trl"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--bf16", action="store_true", help="run under bf16 autocast")
    parser.add_argument("--layout", default="auto", choices=("auto", "shared", "padded"))
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    layout = {"layout": options.layout} if options.side == "ours" else {}
    side = {"ours": our_side, "trl": trl_side}[options.side](MODEL, bf16=options.bf16, **layout)
    perturb_adapters(side)
    rows = synthetic(512, 8, 16, 16)[0]
    for _ in range(3):
        side.step(rows)
    figures = host_milliseconds(side, rows, options.steps)
    table = Table(title=f"{options.side}: CPU milliseconds a step of one micro-batch", title_justify="left")
    table.add_column("part")
    table.add_column("ms", justify="right")
    for part, milliseconds in figures.items():
        table.add_row(part, f"{milliseconds:.2f}")
    Console(width=100).print(table)
    if options.profile:
        pstats.Stats(profile(side, rows, 5)).sort_stats("cumtime").print_stats(60)
    return figures


if __name__ == "__main__":
    main()
