"""Measure the time and memory of preparing chat pairs, and compare with TRL's `DPOTrainer._prepare_dataset`.

    python -m benchmarks.data_time --rows 100000

The rows are synthetic and stored as JSON Lines; each side reads, tokenizes and checks the same rows in a separate
process. CPU seconds include all threads. Memory is the peak of anonymous pages minus the memory after imports, so files
that Arrow maps into memory do not count. `--rows 100000 25000` shows whether memory grows with the number of rows.
"""

import argparse
import json
import logging
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

MODEL = "models/smollm2-135m-instruct"
MAX_LENGTH = 1024


def write_pairs(file: Path, rows: int) -> None:
    """Write conversations of one to three turns with two answers, made of words from a small vocabulary."""
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkq"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(20_000)]

    def say(role: str, low: int, high: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(low, high)))}

    with file.open("w") as out:
        for _ in range(rows):
            turns = [say(role, 10, 60) for _ in range(draw.randint(0, 2)) for role in ("user", "assistant")]
            prompt = [*turns, say("user", 10, 60)]
            pair = {"prompt": prompt, "chosen": [say("assistant", 10, 120)], "rejected": [say("assistant", 10, 120)]}
            out.write(json.dumps(pair) + "\n")


class Clock:
    """Wall and CPU seconds for each step; nested steps are not counted twice."""

    def __init__(self):
        self.wall: Counter[str] = Counter()
        self.cpu: Counter[str] = Counter()
        self._within: list[list[float]] = []

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time spent inside the context to a step."""
        wall, cpu = time.perf_counter(), time.process_time()
        self._within.append([0.0, 0.0])
        try:
            yield
        finally:
            taken = (time.perf_counter() - wall, time.process_time() - cpu)
            inner = self._within.pop()
            self.wall[step] += taken[0] - inner[0]
            self.cpu[step] += taken[1] - inner[1]
            if self._within:
                self._within[-1] = [before + now for before, now in zip(self._within[-1], taken, strict=True)]

    def around(self, owner: Any, name: str, step: str) -> None:
        """Replace a function in its module or class by one that is timed."""
        function = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.timed(step):
                return function(*arguments, **options)

        setattr(owner, name, timed)


@contextmanager
def peak_memory(found: dict[str, float]) -> Iterator[None]:
    """Measure the peak of anonymous memory above its initial value, in MiB, sampled every 10 ms; only on Linux."""

    def now() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

    done, begun = threading.Event(), now()
    peaks = [begun]

    def watch() -> None:
        while not done.wait(0.01):
            peaks.append(max(peaks.pop(), now()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        found["MiB"] = peaks[0] - begun


def ours(data: Dataset, tokenizer: PreTrainedTokenizerBase, clock: Clock) -> Dataset:
    """Prepare and check the rows as `PreferenceTrainer` does."""
    from hf_prefopt import PreferenceConfig
    from hf_prefopt.data import prepare, tokenize
    from hf_prefopt.data.check import check_embeddings, check_examples
    from hf_prefopt.kinds import PAIRS

    clock.around(prepare, "_read", "convert")
    clock.around(tokenize.Renderer, "render", "render")
    clock.around(tokenize, "_encode", "tokenize")
    clock.around(tokenize, "_split_row", "split, mask")
    clock.around(prepare, "truncate_row", "cut")
    clock.around(prepare, "note_row", "count")
    objective = PreferenceConfig("unused", use_cpu=True, bf16=False, report_to="none").build_objective(PAIRS)
    with clock.timed("rows to Arrow and back"):
        prepared = prepare.prepare_dataset(data, tokenizer, max_length=MAX_LENGTH, kind=PAIRS)
    with clock.timed("check"):
        check_embeddings(prepared, len(tokenizer), "train")
        check_examples(prepared, objective, "train")
    return prepared


def trl(data: Dataset, tokenizer: PreTrainedTokenizerBase, clock: Clock) -> Dataset:
    """Prepare the rows as TRL's `DPOTrainer` does; its collator truncates them later."""
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig("unused", use_cpu=True, bf16=False, report_to="none", max_length=MAX_LENGTH)
    with clock.timed("all of it"):
        return DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), data, tokenizer, args, "train")


SIDES: dict[str, Callable[[Dataset, PreTrainedTokenizerBase, Clock], Dataset]] = {"hf_prefopt": ours, "TRL": trl}


@contextmanager
def heard(said: list[str]) -> Iterator[None]:
    """Collect what `hf_prefopt` logs, such as the reasons for which rows are left out."""
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_prefopt")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def measure(side: str, file: str, model: str, folder: str) -> dict[str, Any]:
    """Return the times and the memory of one side, measured in this process."""
    clock, memory = Clock(), {}
    tokenizer = AutoTokenizer.from_pretrained(model)
    prepare, first = SIDES[side], {"rows": 2, "split": "train"}
    with tempfile.TemporaryDirectory() as warm:  # two rows before the clock starts
        write_pairs(Path(warm) / "rows.jsonl", first["rows"])
        prepare(
            load_dataset("json", data_files=f"{warm}/rows.jsonl", cache_dir=warm, split="train"), tokenizer, Clock()
        )
    said: list[str] = []
    with peak_memory(memory), heard(said):
        with clock.timed("read"):
            data = load_dataset("json", data_files=file, cache_dir=folder, split="train")
        prepared = prepare(data, tokenizer, clock)
    tokens = sum(map(len, prepared["prompt_ids"][:1000]))
    found = {"wall": clock.wall, "cpu": clock.cpu, "rows": len(prepared), "prompt tokens": tokens, "said": said}
    return {**found, **memory}


def in_a_process(side: str, file: Path, model: str) -> dict[str, Any]:
    """Return the result of `measure` in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.data_time", "--side", side, str(file), model, folder]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000], help="Number of pairs; several are compared.")
    parser.add_argument("--model", default=MODEL, help="Model whose tokenizer is used.")
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(*arguments.side)))
        return
    console = Console()
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            write_pairs(file, rows)
            found = {side: in_a_process(side, file, arguments.model) for side in SIDES}
        table = Table(title=f"{rows:,} chat pairs")
        for heading in ("", "step", "seconds", "CPU seconds", "rows left", "memory, MiB"):
            table.add_column(heading, justify="left" if heading in ("", "step") else "right")
        for side, one in found.items():
            for step, wall in one["wall"].items():
                table.add_row(side, step, f"{wall:.2f}", f"{one['cpu'][step]:.2f}", "", "")
            total = [f"{sum(one[kind].values()):.2f}" for kind in ("wall", "cpu")]
            table.add_row(side, "total", *total, f"{one['rows']:,}", f"{one['MiB']:.0f}", end_section=True)
        console.print(table)
        ratios = [
            sum(found["TRL"][kind].values()) / sum(found["hf_prefopt"][kind].values()) for kind in ("wall", "cpu")
        ]
        for line in found["hf_prefopt"]["said"]:
            console.print(f"hf_prefopt said: {line}", highlight=False)
        console.print(f"TRL's time / ours: {ratios[0]:.2f}, CPU time {ratios[1]:.2f}")


if __name__ == "__main__":
    main()
