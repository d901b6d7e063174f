"""Check the correctness and speed of the fast path on a CUDA machine, in eight minutes.

    python -m benchmarks.gpu_check --out DIR                      # correctness, speed, losses, a profile, in this order
    python -m benchmarks.gpu_check --device cpu --tiny            # the same code, small enough for any machine

The parts are:

1. Correctness: fp32 weights under autocast use the variable-length kernel; the kernel agrees with an explicit mask
   (fewer queries than keys, grouped heads, sliding windows); both layouts in bf16 agree with fp32; the probe chooses
   the right layout.
2. Speed, on random weights with LoRA, most important cases first: `PreferenceTrainer` against TRL's `DPOTrainer`, or,
   if `trl` cannot be imported, "shared" against "padded" through the scoring functions. Steps alternate and are timed
   with CUDA events after warming up. The results include peak allocated and reserved memory, and MFU based on the
   minimal FLOP of a step.
3. Losses: each loss takes two steps on the CPU and on the device.
4. A profile of one step of each trainer: launches, waits of the host by call site, and the slowest kernels.

Every part prints and writes its results before the next one starts; no case starts later than `--budget` seconds after
the start. The script needs torch, transformers, accelerate and peft. For TRL, copy the wheels of trl, datasets, dill,
multiprocess, pyarrow and other missing packages to the machine, and install them into a folder named `site-packages` on
PYTHONPATH; by this name, dill recognizes modules that it must not pickle.
"""

import argparse
import datetime
import gc
import importlib.util
import json
import sys
import time
import traceback
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def stand_in_for_datasets() -> None:
    """Install stand-ins for the names that `hf_prefopt` imports from `datasets`, if the package is missing.

    The stand-ins are never called.
    """
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
from benchmarks.gpu_levers import put_liger_in  # noqa: E402
from benchmarks.gpu_losses import every_loss  # noqa: E402
from benchmarks.gpu_profile import profiles  # noqa: E402
from benchmarks.gpu_report import as_markdown, print_checks, print_speed  # noqa: E402
from benchmarks.gpu_speed import Case, layouts_in_turns, trainers_in_turns  # noqa: E402

HALF, FULL = torch.bfloat16, torch.float32
# Most important cases first. The number of pairs per step is what fits into 80 GB with TRL's padded activations.
CASES = [
    Case("0.5B", "4:1", FULL, 8),  # the default configuration: fp32 weights under bf16 autocast
    Case("8B", "4:1", HALF, 2),
    Case("8B", "chat", HALF, 6),
    Case("0.5B", "chat", FULL, 8),
    Case("0.5B", "1:1", FULL, 8),
    Case("8B", "1:1", HALF, 2),
    Case("8B", "10:1", HALF, 1),
    Case("0.5B", "4:1", HALF, 8),
    Case("0.5B", "10:1", FULL, 4),
]
TINY_LOSSES = ["dpo", "kto", "lipo"]
TINY_CASES = [Case("tiny", lengths, FULL, 2) for lengths in ("4:1", "1:1", "chat")]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the parts, print tables, and write `gpu.json` and `gpu.md`."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    results: dict[str, Any] = {"about": _about(options.device)}
    print(json.dumps(results["about"]), flush=True)

    def save() -> None:
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "gpu.json").write_text(json.dumps(results, indent=1))
            (options.out / "gpu.md").write_text(as_markdown(results))

    def show_checks(checks: dict[str, Any]) -> None:
        print_checks({name: checks[name] for name in checks if name not in results.get("correctness", {})})
        results["correctness"] = dict(checks)
        print(f"{time.monotonic() - start:.0f} s", flush=True)
        save()

    if "correctness" in options.parts:
        all_checks(options.device, [FULL] if options.device == "cpu" else [HALF, FULL], show_checks)
    if "speed" in options.parts:
        results["speed"] = []
        for case in TINY_CASES if options.tiny else CASES:
            if time.monotonic() - start > options.budget:
                print(f"skipped, because the time budget is used up: {case.names()}", flush=True)
                continue
            results["speed"].append(_speed(case, options))
            print_speed(results["speed"][-1:])
            print(f"{time.monotonic() - start:.0f} s", flush=True)
            save()
        print_speed(results["speed"])
    if "losses" in options.parts and HAS_TRL:
        results["losses"] = {}
        for name, check in every_loss(options.device, TINY_LOSSES if options.tiny else None):
            results["losses"][name] = check
            if time.monotonic() - start > options.budget + 60:
                print(f"losses after {name} skipped, because the time budget is used up", flush=True)
                break
        print_checks({"every loss trains as on the CPU": results["losses"]})
        print(f"{time.monotonic() - start:.0f} s", flush=True)
        save()
    if "profile" in options.parts and HAS_TRL and time.monotonic() - start < options.budget + 90:
        case = (TINY_CASES if options.tiny else CASES)[0]
        results["profile"] = profiles(case, case.rows(options.tiny), options.device, options.out)
        print(json.dumps(results["profile"], indent=1), flush=True)
        save()
    return results


def _speed(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    measure = trainers_in_turns if HAS_TRL and not options.layouts_only else layouts_in_turns
    measure = partial(measure, adapt=put_liger_in) if options.liger else measure
    try:
        figures = measure(case, case.rows(options.tiny), options.rounds, options.device)
    except Exception as error:  # if a case fails, the others still run
        figures = {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
        traceback.print_exc()
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return case.names() | {"by": "trainers" if HAS_TRL and not options.layouts_only else "layouts"} | figures


def _about(device: str) -> dict[str, str]:
    packages = ("torch", "transformers", "accelerate", "peft", "trl", "triton")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "date": datetime.date.today().isoformat(),
        **{name: version(name) for name in packages if importlib.util.find_spec(name)},
    }


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parts = ["correctness", "speed", "losses", "profile"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="use short sequences and the shape 'tiny'")
    parser.add_argument("--layouts-only", action="store_true", help="compare shared with padded, not with trl")
    parser.add_argument("--liger", action="store_true", help="use Liger's kernels in the models of both trainers")
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads")
    parser.add_argument("--budget", type=float, default=360, help="seconds after which no more cases start")
    parser.add_argument("--out", type=Path, help="the folder for results and profiles")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
