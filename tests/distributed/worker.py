"""A rank: run cases under an engine and save their outcomes. `launch.py` starts it."""

import argparse
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed.cases import CASES
from tests.distributed.engines import ENGINES
from tests.distributed.run import run_case


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("engine", choices=ENGINES)
    options.add_argument("folder", type=Path)
    options.add_argument("cases", nargs="*")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if "deepspeed" in ENGINES[arguments.engine].settings:
        import deepspeed

        deepspeed.init_distributed("gloo")  # accelerate would create the same group; it finds this one instead
    for number, name in enumerate(arguments.cases):
        folder = arguments.folder / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            outcome = run_case(CASES[name], ENGINES[arguments.engine], folder)
        except Exception:
            outcome = {"error": traceback.format_exc()}
        torch.save(outcome, folder / f"rank{dist.get_rank()}.pt")
        # After an error on one rank, collective calls of the ranks would no longer match.
        dist.monitored_barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
