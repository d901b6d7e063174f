"""Measure how time and memory grow with the tokens, the responses per prompt, the vocabulary, and the dataset.

Each point runs in a separate process (see `benchmarks.memory`). Only our trainer is measured, because the claim is
linear or constant growth, not a ratio. The vocabulary is varied for a model of four layers, in which the head dominates
the step.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.memory import in_own_process, peak_resident
from benchmarks.sides import vocabulary_of
from benchmarks.work import ROOT, Row, shared_positions, synthetic

_FOUR_LAYERS = "random:layers=4"


def _point(source: str, rows: list[Row]) -> dict[str, float]:
    measured = in_own_process("ours", source, rows, steps=2)
    return {"positions": shared_positions(rows), "scored": _scored(rows), **measured}


def _scored(rows: list[Row]) -> int:
    return sum(len(response) for row in rows for response in row["response_ids"])


def by_tokens(source: str, pairs: tuple[int, ...] = (1, 2, 4, 8)) -> dict[str, Mapping[str, float]]:
    """Increase T, the number of tokens: a growing number of pairs of 96 + 2 · 128 tokens in a step."""
    vocabulary = vocabulary_of(source)
    return {f"{n} pairs": _point(source, synthetic(vocabulary, n, 96, 128)[0]) for n in pairs}


def by_responses(source: str, counts: tuple[int, ...] = (2, 4, 8)) -> dict[str, Mapping[str, float]]:
    """Increase K, the number of responses: one prompt of 512 tokens with a growing number of responses of 64 tokens."""
    vocabulary = vocabulary_of(source)
    return {f"K = {k}": _point(source, synthetic(vocabulary, 1, 512, 64, responses=k)[0]) for k in counts}


def by_pairs_at_fixed_tokens(source: str, counts: tuple[int, ...] = (2, 4, 8)) -> dict[str, Mapping[str, float]]:
    """Increase the number of pairs while they become shorter, with 1,536 tokens in each step."""
    vocabulary = vocabulary_of(source)
    rows = {n: synthetic(vocabulary, n, 512 // n, 512 // n)[0] for n in counts}
    return {f"{n} pairs": _point(source, rows[n]) for n in counts}


def by_vocabulary(sizes: tuple[int, ...] = (16_384, 49_152, 147_456)) -> dict[str, Mapping[str, float]]:
    """Increase V, the size of the vocabulary: four layers and a growing head, eight pairs."""
    rows = synthetic(16_000, 8, 64, 96)[0]
    return {f"V = {size:,}": _point(f"{_FOUR_LAYERS},vocab={size}", rows) for size in sizes}


def by_data_set(sizes: tuple[int, ...] = (1_000, 10_000, 100_000)) -> dict[str, Mapping[str, float]]:
    """Increase the number of rows of a prepared dataset, take one step, and measure the peak of `trainer.train()`."""
    return {f"{size:,} rows": _train_one_step(size) for size in sizes}


def _train_one_step(size: int) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "benchmarks.growth", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"training on {size} rows ended with {done.returncode}: {done.stderr[-800:]}")
    return json.loads(done.stdout.splitlines()[-1])


GROWTH: dict[str, Any] = {
    "tokens (T)": by_tokens,
    "responses of a prompt (K)": by_responses,
    "pairs at fixed tokens": by_pairs_at_fixed_tokens,
    "vocabulary (V)": lambda source: by_vocabulary(),
    "dataset": lambda source: by_data_set(),
}


def _main(size: int) -> None:
    """Take one step of `trainer.train()` on a dataset of `size` rows on disk, and print the peak."""
    import tempfile
    import time

    import torch
    from datasets import Dataset

    from benchmarks.sides import load_model, load_tokenizer, lora, settings
    from hf_prefopt import PreferenceConfig, PreferenceTrainer

    torch.set_num_threads(1)
    source = "random:layers=2,hidden=64,mlp=128,heads=4,key_heads=2,vocab=1000"
    with tempfile.TemporaryDirectory() as folder:
        # The rows are written with a generator and memory-mapped, like those of a dataset from the Hub.
        row = synthetic(1000, 1, 96, 128)[0][0]
        rows = Dataset.from_generator(
            lambda: ({**row, "row": number} for number in range(size)), cache_dir=folder, writer_batch_size=500
        )
        start = peak_resident()
        arguments = PreferenceConfig(**(settings() | {"output_dir": folder, "max_steps": 1}))
        trainer = PreferenceTrainer(
            load_model(source),
            args=arguments,
            train_dataset=rows,
            processing_class=load_tokenizer(source),
            peft_config=lora(),
        )
        seconds = time.process_time()
        trainer.train()
        seconds = time.process_time() - seconds
    print(json.dumps({"before": start, "peak": peak_resident(), "seconds": seconds}))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
