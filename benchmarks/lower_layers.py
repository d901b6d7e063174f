"""What adapters on the upper half of the layers save: counted for a GPU, or measured on this machine's CPU.

Three steps of ours on the same rows: adapters on all layers; on the upper half, where all layers run twice, for policy
and reference; on the upper half, where the lower half runs once for both. For a GPU they are counted as
`benchmarks.roofline` counts, from two and four layers. On the CPU, the last two must have equal losses and gradients,
bit for bit, and the three are timed in turns, by the CPU time of one thread.

    python -m benchmarks.lower_layers --model llama-8b --case 4:1
    python -m benchmarks.lower_layers --measure random: --rounds 5
"""

import argparse
import statistics
import warnings
from dataclasses import replace
from functools import partial
from unittest.mock import patch

COLUMNS = ("TFLOP", "GB moved", "launches", "peak GiB", "estimated ms")
ALL, TWICE, ONCE = "all layers", "upper half, all layers run twice", "upper half, the lower half runs once"


def count(models: list[str], cases: list[str], pairs: int) -> None:
    """Print a table of what a step of each model asks of a GPU."""
    import benchmarks.roofline.__main__ as roofline  # readies the fake device
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
    """Print the ratios of the times of a step, round by round and their medians."""
    import torch

    from benchmarks import sides
    from benchmarks.gpu_speed import chat_lengths
    from benchmarks.paired import cpu_seconds

    torch.set_num_threads(1)

    def side(upper: bool, shares: bool) -> sides.Side:
        depth = sides.load_model(source).config.num_hidden_layers
        layers = range(depth // 2, depth) if upper else None
        with patch.object(sides, "lora", partial(sides.lora, layers)):
            made = sides.our_side(source, reference="adapter_off")
        made.trainer.scorer.settle()
        if not shares:
            made.trainer.reference.lower = None
        return made

    made = {ALL: side(False, True), TWICE: side(True, False), ONCE: side(True, True)}
    rows = chat_lengths(sides.vocabulary_of(source), pairs)
    found = []
    for name in (TWICE, ONCE):
        made[name].model.zero_grad()
        found.append((made[name].backward(rows), made[name].gradients()))
    (loss, gradients), (other_loss, others) = found
    assert torch.equal(loss, other_loss) and all(torch.equal(gradients[name], others[name]) for name in others)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds):
        names = list(made)[:: -1 if number % 2 else 1]
        for name in names:
            seconds[name].append(cpu_seconds(made[name], rows)[0])
    for name in (ALL, TWICE):
        ratios = [slow / fast for slow, fast in zip(seconds[name], seconds[ONCE], strict=True)]
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{ONCE} against {name}: {statistics.median(ratios):.2f} ({listed})", flush=True)


def main() -> None:
    """Count, or with `--measure` time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["llama-8b"], help="shapes of benchmarks.roofline")
    parser.add_argument("--case", nargs="+", default=["4:1"], help="lengths of benchmarks.roofline")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--measure", help="a folder with a model, or `random:` for one of SmolLM2-135M's shape")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.measure is not None:
        measure(options.measure, options.pairs, options.rounds)
    else:
        count(options.model, options.case, options.pairs)


if __name__ == "__main__":
    main()
