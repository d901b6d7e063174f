"""Count the work of a training step on a GPU, for our trainer and TRL's, on a CPU and without weights.

    python -m benchmarks.roofline --model llama-8b --case 4:1
    python -m benchmarks.roofline --model qwen2.5-0.5b --case 4:1 --dtype fp32-autocast   # measured in GPU.md, too
    python -m benchmarks.roofline --tiny

Both trainers run their real `training_step`, clipping and optimizer at a real shape, on fake CUDA tensors. The script
counts FLOP, bytes that operators read and write, kernel launches, waits of the host by call site, and peak memory.
These counts are exact. The milliseconds on an H100 are estimated from them (`estimate.py`) and do not include Python's
time, which `python -m benchmarks.host_time` measures. A C++ compiler is needed to build a device without memory.
"""

import warnings

from benchmarks.roofline.fake_device import load_device

load_device()

import argparse  # noqa: E402
import json  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from benchmarks.gpu_speed import LENGTHS, TINY_LENGTHS, chat_lengths  # noqa: E402
from benchmarks.roofline.models import CONFIGS, config_of  # noqa: E402
from benchmarks.roofline.stepping import DTYPES, Case, counted_step  # noqa: E402
from benchmarks.roofline.table import figures, markdown, names_of, show, show_sites, with_more_layers  # noqa: E402
from benchmarks.work import Row, synthetic  # noqa: E402

MODELS = [name for name in CONFIGS if name != "tiny"]
SIDES = ("trl", "ours")
LONG = {"8k": (6554, 1638)}
CASES = [*LENGTHS, *LONG, "chat"]


def rows_of(lengths: str, pairs: int, tiny: bool) -> list[Row]:
    """Return the rows of a micro-batch. The values of the tokens do not matter; every vocabulary contains them."""
    if lengths == "chat":
        return chat_lengths(512, pairs)
    return synthetic(512, pairs, *(TINY_LENGTHS | LONG if tiny else LENGTHS | LONG)[lengths])[0]


def main(arguments: list[str] | None = None) -> list[dict]:
    """Count the work, print a table for each case, and write the requested files."""
    options = _options(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)
    records = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    for model in ["tiny"] if options.tiny else options.model:
        for lengths in options.case:
            rows = rows_of(lengths, options.pairs, options.tiny)
            case = Case(
                model, lengths, rows, options.mode, options.dtype, options.checkpointing, options.keep_attention
            )
            records.append(_by_layer(case) if options.by_layer else _whole(case))
            if options.json:
                options.json.write_text(json.dumps(records, indent=1))
    if options.markdown:
        options.markdown.write_text(markdown(records))
    return records


def _whole(case: Case) -> dict[str, Any]:
    """Print and return the results of both sides."""
    found = {side: counted_step(side, case) for side in SIDES}
    show(case, *map(figures, found.values()))
    for side, counts in found.items():
        show_sites(side, counts)
    sites = {"waits": {s: c.waits for s, c in found.items()}, "kept": {s: c.kept for s, c in found.items()}}
    return {"case": names_of(case), **{side: figures(counts) for side, counts in found.items()}, **sites}


def _by_layer(case: Case) -> dict[str, Any]:
    """Return the results of both sides, extrapolated from two and three layers."""
    depth = config_of(case.model).num_hidden_layers

    def found(side: str) -> dict[str, float]:
        few = (replace(case, changes={"num_hidden_layers": layers}) for layers in (2, 3))
        return with_more_layers(*(figures(counted_step(side, each)) for each in few), depth - 2)

    both = {side: found(side) for side in SIDES}
    show(case, *both.values())
    return {"case": names_of(case), **both}


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["qwen3-0.6b"], choices=MODELS)
    parser.add_argument("--case", nargs="+", default=["4:1"], choices=CASES, help="prompt : response, or chat lengths")
    parser.add_argument("--pairs", type=int, default=8, help="pairs per micro-batch (default 8)")
    parser.add_argument("--mode", default="lora", choices=("lora", "full"))
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES), help="of the weights (steps use autocast)")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--keep-attention", action="store_true", help="ours: checkpointing_keeps='attention'")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers and short rows")
    by_layer = "count two and three layers and extrapolate to all: seconds instead of minutes"
    parser.add_argument("--by-layer", action="store_true", help=by_layer)
    parser.add_argument("--json", type=Path, help="a JSON file to which the figures are added")
    parser.add_argument("--markdown", type=Path, help="a file for the tables of all figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
