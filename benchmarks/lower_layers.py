"""What adapters on the upper half of the layers save on a GPU, counted as `benchmarks.roofline` counts.

Three steps on the same rows: adapters on all layers; on the upper half, all layers run twice; on the upper half, the
lower half run once for policy and reference. Two and four layers are counted, and the others taken from them.

    python -m benchmarks.lower_layers --model llama-8b --case 4:1
"""

import benchmarks.roofline.__main__ as roofline  # first: it readies the fake device  # noqa: I001
import argparse
import warnings
from dataclasses import replace

from benchmarks.roofline.models import config_of
from benchmarks.roofline.stepping import Case, counted_step
from benchmarks.roofline.table import Figures, figures, with_more_layers

COLUMNS = ("TFLOP", "GB moved", "launches", "peak GiB", "estimated ms", "  reference")


def counted(case: Case, upper: bool) -> Figures:
    """The figures of our step at the model's depth, from one and two layers of each half."""

    def of(depth: int) -> Figures:
        adapted = tuple(range(depth // 2, depth)) if upper else None
        return figures(counted_step("ours", replace(case, changes={"num_hidden_layers": depth}, adapted=adapted)))

    return with_more_layers(of(2), of(4), (config_of(case.model).num_hidden_layers - 2) // 2)


def main() -> None:
    """Print a table for each model and case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["llama-8b"], choices=roofline.MODELS)
    parser.add_argument("--case", nargs="+", default=["4:1"], choices=roofline.CASES)
    parser.add_argument("--pairs", type=int, default=8)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    print("| model | lengths | adapters | " + " | ".join(map(str.strip, COLUMNS)) + " |")
    print("| --- " * (len(COLUMNS) + 3) + "|")
    for model in options.model:
        for lengths in options.case:
            case = Case(model, lengths, roofline.rows_of(lengths, options.pairs, tiny=False))
            rows = {
                "all layers": counted(case, upper=False),
                "upper half, all layers run twice": counted(replace(case, shares=False), upper=True),
                "upper half, the lower half runs once": counted(case, upper=True),
            }
            for name, found in rows.items():
                cells = [f"{found[column]:,.0f}" for column in COLUMNS]
                print(f"| {model} | {lengths} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
