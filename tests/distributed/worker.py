"""A rank: run cases under engines and save their outcomes. `launch.py` starts it."""

import argparse
import gc
import os
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from tests.distributed.cases import CASES
from tests.distributed.engines import ENGINES, compile_no_sums
from tests.distributed.run import run_case


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path)
    options.add_argument("runs", nargs="*", help="ENGINE: CASE")
    arguments = options.parse_args()
    runs = [run.split(": ", 1) for run in arguments.runs]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if any(ENGINES[engine].is_deepspeed for engine, _ in runs):
        import deepspeed

        compile_no_sums()
        deepspeed.init_distributed("gloo")  # accelerate would create the same group; it finds this one instead
    gc.freeze()  # each training begins with a collection, which would look through all modules
    for number, (engine, name) in enumerate(runs):
        folder = arguments.folder / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with mock.patch.dict(os.environ):  # TrainingArguments sets variables
                outcome = run_case(CASES[name], ENGINES[engine], folder)
        except Exception:
            outcome = {"error": traceback.format_exc()}
        torch.save(outcome, folder / f"rank{dist.get_rank()}.pt")
        # After an error on one rank, collective calls of the ranks would no longer match.
        dist.monitored_barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
