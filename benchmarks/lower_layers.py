"""Measure what adapters on the upper half of the layers save: counted for a GPU, or timed on the CPU of this machine.

Our trainer takes steps on the same rows in three variants: with adapters on all layers; with adapters on the upper
half, where all layers run twice, for policy and reference; and with adapters on the upper half, where the lower half
runs once for both. For a GPU, the steps are counted as in `benchmarks.roofline`, and extrapolated from two and four
layers.

On the CPU, the fourth variant is TRL's trainer with adapters on all layers. Before timing, the script checks that the
second and third variants have equal losses and gradients, bit for bit, and that the first variant agrees with TRL. Then
the variants take alternating steps, measured in CPU time of one thread. With the default model and rows, `--measure`
takes about two minutes.

    python -m benchmarks.lower_layers --model llama-8b --case 4:1
    python -m benchmarks.lower_layers --measure
"""

import argparse
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

COLUMNS = ("TFLOP", "GB moved", "launches", "peak GiB", "estimated ms")
TRL = "TRL, all layers"
# Numbers of prompt and response tokens, and the model, of `--measure`: as wide as SmolLM2-135M, with fewer layers.
LENGTHS, SMALL = (256, 64), "random:layers=12,vocab=8192"
ALL, TWICE, ONCE = "all layers", "upper half, all layers run twice", "upper half, the lower half runs once"


def count(models: list[str], cases: list[str], pairs: int) -> None:
    """Print a table of the counted work of a step of each model on a GPU."""
    import benchmarks.roofline.__main__ as roofline  # must run before torch is imported
    from benchmarks.roofline.models import config_of
    from benchmarks.roofline.stepping import Case, counted_step
    from benchmarks.roofline.table import figures, with_more_layers

    def counted(case: Case, upper: bool) -> dict[str, float]:
        def of(depth: int) -> dict[str, float]:
            adapted = tuple(range(depth // 2, depth)) if upper else None
            return figures(counted_step("ours", replace(case, changes={"num_hidden_layers": depth}, adapted=adapted)))

        return with_more_layers(of(2), of(4), (config_of(case.model).num_hidden_layers - 2) // 2)

    print("| model | lengths | adapters | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (len(COLUMNS) + 3) + "|")
    for model in models:
        for lengths in cases:
            case = Case(model, lengths, roofline.rows_of(lengths, pairs, tiny=False))
            for name in (ALL, TWICE, ONCE):
                found = counted(replace(case, shares=name == ONCE), upper=name != ALL)
                cells = [f"{found[column]:,.0f}" for column in COLUMNS]
                print(f"| {model} | {lengths} | {name} | " + " | ".join(cells) + " |", flush=True)


def measure(source: str, pairs: int, rounds: int) -> None:
    """Print the ratios of the step times, round by round, and their medians."""
    import torch

    from benchmarks import sides
    from benchmarks.paired import agreement, cpu_seconds
    from benchmarks.work import synthetic

    torch.set_num_threads(1)
    made = {TRL: sides.trl_side(source)} | {name: _our_side(source, name) for name in (ALL, TWICE, ONCE)}
    sides.perturb_adapters(made[TRL], made[ALL])
    sides.perturb_adapters(made[TWICE], made[ONCE])
    batches = synthetic(sides.vocabulary_of(source), pairs, *LENGTHS, steps=rounds + 1)
    agreement(made[TRL], made[ALL], batches[0]).check()
    _assert_same_bits(made[TWICE], made[ONCE], batches[0])
    print("losses and gradients: as TRL's for all layers, and equal bit for bit for the upper half", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number, rows in enumerate(batches[1:]):
        for name in list(made)[:: -1 if number % 2 else 1]:
            seconds[name].append(cpu_seconds(made[name], rows)[0])
            print(f"round {number + 1} of {rounds}: {seconds[name][-1]:6.2f} s, {name}", flush=True)
    for name in (TRL, ALL, TWICE):
        ratios = [slow / fast for slow, fast in zip(seconds[name], seconds[ONCE], strict=True)]
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{name} / {ONCE}: {statistics.median(ratios):.2f} ({listed})", flush=True)


def _our_side(source: str, name: str) -> Any:
    """Return our trainer with the adapters of a variant, after it has chosen its layout and lower layers."""
    from benchmarks import sides

    depth = sides.load_model(source).config.num_hidden_layers
    layers = None if name == ALL else range(depth // 2, depth)
    with patch.object(sides, "lora", partial(sides.lora, layers)):
        side = sides.our_side(source, reference="adapter_off")
    side.trainer.scorer.settle()
    if name == TWICE:
        side.trainer.reference.lower = None
    return side


def _assert_same_bits(one: Any, other: Any, rows: Sequence[Any]) -> None:
    """Raise `AssertionError` unless two sides have equal losses and gradients, bit for bit."""
    import torch

    found = []
    for side in (one, other):
        side.model.zero_grad()
        found.append((side.backward(rows), side.gradients()))
        side.model.zero_grad()
    (loss, gradients), (other_loss, others) = found
    assert torch.equal(loss, other_loss) and all(torch.equal(gradients[name], others[name]) for name in others)


def main() -> None:
    """Count the work or, with `--measure`, time the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["llama-8b"], help="shapes of benchmarks.roofline")
    parser.add_argument("--case", nargs="+", default=["4:1"], help="lengths of benchmarks.roofline")
    parser.add_argument("--pairs", type=int, help="pairs per step (default 8; 2 with --measure)")
    parser.add_argument("--measure", nargs="?", const=SMALL, help=f"a model's folder, or random:… (default {SMALL})")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.measure is not None:
        measure(options.measure, options.pairs or 2, options.rounds)
    else:
        count(options.model, options.case, options.pairs or 8)


if __name__ == "__main__":
    main()
