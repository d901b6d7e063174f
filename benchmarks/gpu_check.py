"""One call of eight minutes on a CUDA machine: is the fast path right there, and how fast is it?

    python -m benchmarks.gpu_check --out DIR                      # correctness, speed, losses, a profile, in this order
    python -m benchmarks.gpu_check --device cpu --tiny            # the same code, small enough for any machine

Correctness first: fp32 weights under autocast reach the variable-length kernel; the kernel against a mask written out
(fewer queries than keys, grouped heads, sliding windows); both layouts in bf16 against fp32; what the probe decides.
Then speed on random weights, LoRA, the cases in the order of what matters: `PreferenceTrainer` against TRL's
`DPOTrainer`, or where `trl` cannot be imported "shared" against "padded" through the scoring functions. Timed by CUDA
events after warming up, in turns; peak allocated and reserved memory; MFU on the fewest FLOP that the step needs. Then
two steps with each loss that there is, on the CPU and on the device. Last a profile of one step of each trainer:
launches, waits of the host by call site, the kernels that take longest.

Every part prints and writes its results before the next one starts; `--budget` seconds after the start no further case
is begun. Needs torch, transformers, accelerate, peft. For TRL, carry the wheels trl, datasets, dill, multiprocess,
pyarrow and what else is missing there, and install them into a folder called `site-packages` on PYTHONPATH: by that
name dill knows what it must not pickle.
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
from benchmarks.gpu_levers import put_liger_in  # noqa: E402
from benchmarks.gpu_losses import every_loss  # noqa: E402
from benchmarks.gpu_profile import profiles  # noqa: E402
from benchmarks.gpu_report import as_markdown, print_checks, print_speed  # noqa: E402
from benchmarks.gpu_speed import Case, layouts_in_turns, trainers_in_turns  # noqa: E402

HALF, FULL = torch.bfloat16, torch.float32
# In the order of what matters; pairs a step are what TRL's padded activations leave room for in 80 GB.
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
    """Run the parts, print tables, write `gpu.json` and `gpu.md`."""
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
                print(f"left out for lack of time: {case.names()}", flush=True)
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
                print(f"losses after {name} left out for lack of time", flush=True)
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
    except Exception as error:  # one case's failure leaves the others their time
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
    parser.add_argument("--tiny", action="store_true", help="short sequences and the shape 'tiny'")
    parser.add_argument("--layouts-only", action="store_true", help="shared against padded even where trl is there")
    parser.add_argument("--liger", action="store_true", help="Liger's kernels in both trainers' models")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--budget", type=float, default=360, help="seconds after which no further case is started")
    parser.add_argument("--out", type=Path, help="a folder for the results and the profiles")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
