"""Train every registered loss for a few steps on real preferences, and print one table.

The model consists of the first layers of SmolLM2-135M-Instruct, with its whole vocabulary. Data and hyperparameters
come from the loss's file in `recipes/configs/`, so the sweep also checks that all these files run.

    python -m benchmarks.sweep --layers 3 --steps 6 --write benchmarks/SWEEP.md
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from datasets.utils.logging import disable_progress_bar
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from benchmarks.report import machine
from hf_prefopt import PreferenceTrainer, list_losses
from hf_prefopt.commands import train
from hf_prefopt.commands.parser import parser_of
from hf_prefopt.recipe.adapters import lora_of
from hf_prefopt.recipe.data import load_pairs
from hf_prefopt.recipe.settings import read_recipe

COLUMNS = ("loss", "first loss", "seconds a step")


@dataclass
class Run:
    """The result of a few steps of a loss: the first logged loss, and the seconds per step."""

    loss: str
    first: float
    seconds: float

    def cells(self) -> list[str]:
        """Return the row of the table."""
        return [self.loss, *(f"{figure:.4g}" for figure in (self.first, self.seconds))]


def run(loss: str, layers: int, steps: int, pairs: int) -> Run:
    """Train a few steps of a loss with its configuration file."""
    with tempfile.TemporaryDirectory() as folder:
        small = {
            "output_dir": folder,
            "max_steps": steps,
            "train_rows": steps * pairs,
            "per_device_train_batch_size": pairs,
            "logging_steps": 1,
        }
        options = [part for name, value in small.items() for part in (f"--{name}", str(value))]
        typed = parser_of(train, "sweep").parse_args(["--config", loss, *options, "--eval_strategy", "no"])
        typed.command_line = []
        recipe = read_recipe(typed)
        training = recipe.training
        training.eval_on_start, training.disable_tqdm = False, True
        training.model_init_kwargs = {**training.model_init_kwargs, "num_hidden_layers": layers}
        rows, _ = load_pairs(recipe.data, training)
        trainer = PreferenceTrainer(
            recipe.model.model_name_or_path, args=training, train_dataset=rows, peft_config=lora_of(recipe.model)
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start) / trainer.state.global_step
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Run(loss, logs[0]["loss"], seconds)


def as_markdown(runs: list[Run], arguments: argparse.Namespace) -> str:
    """Return the table, with a description of the machine."""
    where = ", ".join(f"{name} {value}" for name, value in machine().items())
    head = (
        "# Every loss, a few steps\n\n"
        f"`python -m benchmarks.sweep --layers {arguments.layers} --steps {arguments.steps} "
        f"--pairs {arguments.pairs}` trains "
        f"the first {arguments.layers} layers of SmolLM2-135M-Instruct with the whole vocabulary, "
        f"{arguments.pairs} examples per step. The table shows that each loss trains with its file in "
        "`recipes/configs/` with finite values only, and how long a step takes. A few steps on a few examples do not "
        "show what a model learns.\n\n"
        f"{where}\n"
    )
    rows = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *(r.cells() for r in runs))]
    return head + "\n" + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=4, help="examples per step")
    parser.add_argument("--losses", nargs="*", default=list_losses())
    parser.add_argument("--write", type=Path, help="the Markdown file for the table")
    arguments = parser.parse_args()
    disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # no warnings about the missing layers

    runs = []
    console = Console()
    for loss in arguments.losses:
        with console.status(f"{loss} ({len(runs) + 1} of {len(arguments.losses)})"):
            runs.append(run(loss, arguments.layers, arguments.steps, arguments.pairs))
    table = Table(*COLUMNS, title=f"{len(runs)} losses, {arguments.steps} steps of {arguments.pairs} examples")
    for finished in runs:
        table.add_row(*finished.cells())
    console.print(table)
    if arguments.write:
        arguments.write.write_text(as_markdown(runs, arguments))


if __name__ == "__main__":
    main()
