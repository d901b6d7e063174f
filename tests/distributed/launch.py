"""Two processes on the CPU that run cases under an engine, and one process that runs the same."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.distributed.cases import CASES
from tests.distributed.engines import Engine
from tests.distributed.run import run_case

ROOT = Path(__file__).parents[2]
WORLD_SIZE = 2


def launch(runs: list[tuple[str, str]], folder: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What came out of each engine and case, by rank: `run_case`'s outcome, or an `error`.

    One start of two processes for all of them, because starting them costs more than most cases do.
    """
    output = torchrun("tests.distributed.worker", folder, *map(": ".join, runs), timeout=3600)
    outcomes = {}
    for number, run in enumerate(runs):
        files = [folder / str(number) / f"rank{rank}.pt" for rank in range(WORLD_SIZE)]
        died = {"error": output}
        outcomes[run] = [torch.load(file, weights_only=False) if file.exists() else died for file in files]
    return outcomes


def torchrun(module: str, *arguments: object, ranks: int = WORLD_SIZE, timeout: int = 900) -> str:
    """Run a module in several processes; the end of what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command += ["-m", module, *map(str, arguments)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    return (process.stdout + process.stderr)[-4000:]


@functools.cache
def one_process(case: str) -> dict[str, Any]:
    """What comes out of a case in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return run_case(CASES[case], Engine(), Path(folder))


def differences(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest difference of the losses, of the weights (as a share of their largest change) and of the metrics."""
    if len(actual["losses"]) != len(expected["losses"]) or actual["metrics"].keys() != expected["metrics"].keys():
        return dict.fromkeys(("losses", "weights", "metrics"), float("inf"))
    metrics = ((actual["metrics"][name], value, name) for name, value in expected["metrics"].items())
    return {
        "losses": max(abs(a - b) for a, b in zip(actual["losses"], expected["losses"], strict=True)),
        "weights": largest_difference(actual["weights"], expected["weights"]) / expected["scale"],
        # In the unit of a loss and of rewards: β times log-ratios in nats, β = 0.1.
        "metrics": max(abs(a - b) / max(10.0 if "log_ratios/" in name else 1.0, abs(b)) for a, b, name in metrics),
    }


def largest_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    assert actual.keys() == expected.keys()
    return max((actual[name] - expected[name]).abs().max().item() for name in expected)
