"""Scenes for two processes: a scene is a function that every rank calls and that returns numbers.

As a module, this file runs the given scenes of a test module, one after the other:
`python -m torch.distributed.run … -m tests.distributed.scenes FOLDER TEST_MODULE SCENE…`.
"""

import gc
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.distributed.engines import compile_no_sums
from tests.distributed.launch import WORLD_SIZE, torchrun


def play(
    scenes: list[Callable[[Path], Any]], folder: Path, ranks: int = WORLD_SIZE, timeout: int = 900
) -> dict[str, list[Any]]:
    """Return the result of each scene on each rank, keyed by the scene's name; an error is returned as its text."""
    names = [scene.__name__ for scene in scenes]
    module = scenes[0].__module__
    output = torchrun("tests.distributed.scenes", folder, module, *names, ranks=ranks, timeout=timeout)
    files = {name: [folder / f"{name}{rank}.pt" for rank in range(ranks)] for name in names}
    return {
        name: [torch.load(file, weights_only=False) if file.exists() else output for file in of_ranks]
        for name, of_ranks in files.items()
    }


def _main(folder: str, module: str, *names: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    scenes = importlib.import_module(module)
    if any(name.startswith("zero") for name in names):
        compile_no_sums()
    gc.freeze()  # each training begins with a collection, which would look through all modules
    for name in names:
        unset_hf_deepspeed_config()
        try:
            with mock.patch.dict(os.environ):  # TrainingArguments sets variables
                outcome = getattr(scenes, name)(Path(folder, name))
        except Exception:
            outcome = traceback.format_exc()
        torch.save(outcome, Path(folder, f"{name}{dist.get_rank()}.pt"))
        # After an error on one rank, collective calls of the ranks would no longer match.
        dist.monitored_barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
