"""Measure the peak memory of one side on one batch, in a separate process.

The parent writes the task as JSON to the child's standard input. The child loads one trainer, takes steps, and prints
its peak resident memory: `VmHWM` on Linux, which starts at zero in a child process, and `ru_maxrss` elsewhere.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.work import ROOT, Row

GIB = 1024**3


def in_own_process(
    side: str,
    source: str,
    rows: Sequence[Row],
    changes: Mapping[str, Any] | None = None,
    lever: str | None = None,
    steps: int = 1,
) -> dict[str, float]:
    """Take one or more steps of a side on these rows, in a separate process.

    Args:
        side: "trl" or "ours". source: see `benchmarks.sides.load_model`.
        changes: settings of the trainer. lever: a name in `benchmarks.ablation.LEVERS` to switch off.

    Returns:
        `peak` and `before` (resident GiB: the maximum, and the value before the first step), and `seconds`, the CPU
        time of the last step.

    Raises:
        RuntimeError: the process failed; the message includes its last lines.
    """
    job = {"side": side, "source": source, "rows": list(rows), "changes": dict(changes or {})}
    job |= {"lever": lever, "steps": steps}
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "benchmarks.memory"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{side} in its own process ended with {done.returncode}: {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_resident() -> float:
    """Return the peak resident memory of this process in GiB."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / GIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def _main() -> None:
    import torch

    from benchmarks.ablation import lever_off
    from benchmarks.sides import SIDES, perturb_adapters

    job = json.load(sys.stdin)
    torch.set_num_threads(1)
    side = SIDES[job["side"]](job["source"], **job["changes"])
    perturb_adapters(side)
    before = peak_resident()
    with lever_off(side, job["lever"]) if job["lever"] else nullcontext():
        for _ in range(job["steps"]):
            start = time.process_time()
            side.step(job["rows"])
    seconds = time.process_time() - start
    print(json.dumps({"peak": peak_resident(), "before": before, "seconds": seconds}))


if __name__ == "__main__":
    _main()
