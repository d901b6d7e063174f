"""Run cases in two CPU processes under an engine, and the same cases in one process."""

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
    """Return the outcome of each engine and case by rank: the result of `run_case`, or an `error`.

    The two processes are started once for all of them, because starting them takes longer than most cases.
    """
    output = torchrun("tests.distributed.worker", folder, *map(": ".join, runs), timeout=3600)
    outcomes = {}
    for number, run in enumerate(runs):
        files = [folder / str(number) / f"rank{rank}.pt" for rank in range(WORLD_SIZE)]
        died = {"error": output}
        outcomes[run] = [torch.load(file, weights_only=False) if file.exists() else died for file in files]
    return outcomes


def torchrun(module: str, *arguments: object, ranks: int = WORLD_SIZE, timeout: int = 900) -> str:
    """Run a module in several processes, and return the end of their output."""
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
    """Return the outcome of a case in this process."""
    with tempfile.TemporaryDirectory() as folder:
        return run_case(CASES[case], Engine(), Path(folder))


def differences(actual: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Return the largest differences of losses, of weights (relative to their largest change) and of metrics."""
    if len(actual["losses"]) != len(expected["losses"]) or actual["metrics"].keys() != expected["metrics"].keys():
        return dict.fromkeys(("losses", "weights", "metrics"), float("inf"))
    metrics = ((actual["metrics"][name], value, name) for name, value in expected["metrics"].items())
    return {
        "losses": max(abs(a - b) for a, b in zip(actual["losses"], expected["losses"], strict=True)),
        "weights": largest_difference(actual["weights"], expected["weights"]) / expected["scale"],
        # Metrics are compared in the unit of a loss and of rewards: β times log-ratios in nats, β = 0.1.
        "metrics": max(abs(a - b) / max(10.0 if "log_ratios/" in name else 1.0, abs(b)) for a, b, name in metrics),
    }


def largest_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of any weight."""
    assert actual.keys() == expected.keys()
    return max((actual[name] - expected[name]).abs().max().item() for name in expected)
