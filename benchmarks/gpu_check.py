"""One call on a CUDA machine: is the fast path right there, and how fast is it?

    python -m benchmarks.gpu_check --out DIR                      # correctness, then speed
    python -m benchmarks.gpu_check --device cpu --tiny            # the same code, small enough for any machine

Correctness first: the variable-length kernel against a mask written out (fewer queries than keys, grouped heads,
sliding windows), both layouts in bf16 against fp32, what the probe decides. Then speed on random weights, LoRA, bf16,
nothing padded, prompt : response 1:1, 4:1 and 10:1: "shared" against "padded" through the scoring functions, and, where
`trl` can be imported, `PreferenceTrainer` against TRL's `DPOTrainer`. Timed by CUDA events after warming up, in turns;
peak allocated and reserved memory; MFU on the fewest FLOP that the step needs.

Needs torch, transformers, accelerate, peft. Without `datasets` or `trl`, the two layouts are compared instead. For TRL,
carry the wheels trl, datasets, pyarrow, dill, multiprocess, xxhash and what else `pip show` misses there, and put them
on PYTHONPATH. Where the time is short: `--shapes 0.5B 8B`, and a second call for the rest.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table


def stand_in_for_datasets() -> None:
    """Names of `datasets` that `hf_prefopt` imports and this check never calls, where the package is absent."""
    if importlib.util.find_spec("datasets") is not None:
        return
    module = ModuleType("datasets", "stand-in of benchmarks.gpu_check")
    module.__spec__ = ModuleSpec("datasets", None)
    for name in ("Dataset", "IterableDataset", "Features", "List", "Value"):
        setattr(module, name, type(name, (), {"__init__": lambda self, *args, **kwargs: None}))
    sys.modules["datasets"] = module


HAS_TRL = importlib.util.find_spec("trl") is not None and importlib.util.find_spec("datasets") is not None
stand_in_for_datasets()

from benchmarks.gpu_correctness import all_checks  # noqa: E402
from benchmarks.gpu_speed import layouts_in_turns, pairs_that_fit, trainers_in_turns  # noqa: E402
from benchmarks.shapes import SHAPES  # noqa: E402

TARGETS = {"1:1": 1.2, "4:1": 1.5, "10:1": 1.7}
# Prompt and response tokens.
LENGTHS = {"1:1": (512, 512), "4:1": (1024, 256), "10:1": (2560, 256)}
TINY_LENGTHS = {"1:1": (16, 16), "4:1": (64, 16), "10:1": (160, 16)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the checks and the benchmark, print tables, write `gpu.json`."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    about = _about(options.device)
    print(json.dumps(about), flush=True)
    results: dict[str, Any] = {"about": about}

    def save() -> None:
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "gpu.json").write_text(json.dumps(results, indent=1))

    if "correctness" in options.parts:
        dtypes = [torch.float32] if options.device == "cpu" else [torch.float32, torch.bfloat16]
        results["correctness"] = all_checks(options.device, dtypes)
        _print_checks(results["correctness"])
        save()
    if "speed" in options.parts:
        results["speed"] = []
        start = time.monotonic()
        for shape in options.shapes:
            for lengths in options.lengths:
                if time.monotonic() - start > options.budget:
                    print(f"left out for lack of time: {shape} {lengths}", flush=True)
                    continue
                results["speed"].append(_speed(shape, lengths, options))
                _print_speed(results["speed"][-1:])
                save()
        _print_speed(results["speed"])
    return results


def _speed(shape: str, lengths: str, options: argparse.Namespace) -> dict[str, Any]:
    prompt, response = (TINY_LENGTHS if options.tiny else LENGTHS)[lengths]
    measure = trainers_in_turns if HAS_TRL and not options.layouts_only else layouts_in_turns
    pairs = 2 if options.tiny else pairs_that_fit(shape, prompt, response)
    case = {"shape": shape, "lengths": lengths, "pairs": pairs, "target": TARGETS[lengths], "by": measure.__name__}
    try:
        figures = measure(shape, prompt, response, pairs, options.rounds, options.device)
    except torch.OutOfMemoryError as error:
        figures = {"error": str(error).splitlines()[0]}
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return case | figures


def _about(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__, "trl": str(HAS_TRL)}


def _print_checks(results: dict[str, dict[str, dict[str, Any]]]) -> None:
    for group, checks in results.items():
        table = Table(title=group, title_justify="left")
        for column in ("check", "ok", "figures"):
            table.add_column(column)
        for name, check in checks.items():
            figures = ", ".join(
                f"{k} {v:.1e}" if isinstance(v, float) else str(v) for k, v in check.items() if k != "ok"
            )
            table.add_row(name, "yes" if check["ok"] else "NO", figures)
        Console(width=150).print(table)


def _print_speed(cases: list[dict[str, Any]]) -> None:
    table = Table(title="Speed: the peer's step time / ours", title_justify="left")
    columns = (
        "shape",
        "lengths",
        "ratio",
        "range",
        "target",
        "ms peer",
        "ms ours",
        "peak GiB peer",
        "ours",
        "MFU",
        "apart",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for case in cases:
        if "error" in case:
            table.add_row(case["shape"], case["lengths"], case["error"][:60])
            continue
        ratios = case["ratios"]
        memory = [f"{case[side]['allocated']:.1f} ({case[side]['reserved']:.1f})" for side in ("peer", "ours")]
        table.add_row(
            case["shape"],
            case["lengths"],
            f"{case['ratio']:.2f}×",
            f"{min(ratios):.2f} – {max(ratios):.2f}",
            f"≥ {case['target']}×",
            *(f"{1000 * statistics.median(case[side]['seconds']):.1f}" for side in ("peer", "ours")),
            *memory,
            f"{case['mfu']:.1%}" if case["mfu"] is not None else "–",
            f"{case['loss_apart']:.0e}",
        )
    Console(width=150).print(table)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--parts", nargs="+", default=["correctness", "speed"], choices=["correctness", "speed"])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="default: 0.5B 1.5B 3B 8B")
    parser.add_argument("--lengths", nargs="+", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="short sequences and the shape 'tiny'")
    parser.add_argument("--layouts-only", action="store_true", help="shared against padded even where trl is there")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no further case is started")
    parser.add_argument("--out", type=Path, help="a folder for gpu.json")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or (["tiny"] if options.tiny else ["0.5B", "1.5B", "3B", "8B"])
    return options


if __name__ == "__main__":
    main()
