"""Train every registered loss for a few steps on one batch of real preferences, and print the loss before and after.

The loss must fall. A fall shows that a loss, the data of its file in `recipes/configs/`, and its gradient fit together.
The model consists of the first layers of SmolLM2-135M-Instruct, with its whole vocabulary.

    python -m benchmarks.sweep --write benchmarks/SWEEP.md
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from datasets.utils.logging import disable_progress_bar
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from benchmarks.report import machine
from hf_prefopt import PreferenceTrainer, get_loss, list_losses
from hf_prefopt.commands import train
from hf_prefopt.commands.parser import parser_of
from hf_prefopt.recipe.adapters import lora_of
from hf_prefopt.recipe.data import load_pairs
from hf_prefopt.recipe.settings import read_recipe

COLUMNS = ("loss", "examples", "before", "after")
LEARNING_RATE = 1e-3


@dataclass
class Run:
    """The kind of a loss's examples, and the loss of one batch at the first and at the last step."""

    loss: str
    kind: str
    first: float
    last: float

    def cells(self) -> list[str]:
        """Return the row of the table."""
        return [self.loss, self.kind, *(f"{figure:.4g}" for figure in (self.first, self.last))]


def run(loss: str, layers: int, steps: int, examples: int) -> Run:
    """Train a few steps of a loss on the same examples, with its configuration file."""
    with tempfile.TemporaryDirectory() as folder:
        small = {
            "output_dir": folder,
            "max_steps": steps,
            "train_rows": examples,
            "per_device_train_batch_size": examples,
            "logging_steps": 1,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
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
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(loss, get_loss(loss).kind.name, losses[0], losses[-1])


def as_markdown(runs: list[Run], arguments: argparse.Namespace) -> str:
    """Return the table, with a description of the machine."""
    where = ", ".join(f"{name} {value}" for name, value in machine().items())
    head = (
        "# Every loss, before and after a few steps\n\n"
        f"`python -m benchmarks.sweep --layers {arguments.layers} --steps {arguments.steps} "
        f"--examples {arguments.examples}` trains {arguments.steps} steps on the same {arguments.examples} examples, "
        "with the data and the settings of the loss's file in `recipes/configs/` and a constant learning rate of "
        f"{LEARNING_RATE:g}. The model is the first {arguments.layers} layers of SmolLM2-135M-Instruct with the whole "
        f"vocabulary.\n\n{sum(r.last < r.first for r in runs)} of {len(runs)} losses fall. A fall shows that a loss, "
        "its data, and its gradient fit together; it does not show what a model learns. Losses have different scales: "
        "compare a row with itself only.\n\n"
        f"{where}\n"
    )
    rows = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *(r.cells() for r in runs))]
    return head + "\n" + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--examples", type=int, default=4, help="rows of the batch")
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
            runs.append(run(loss, arguments.layers, arguments.steps, arguments.examples))
    table = Table(*COLUMNS, title=f"{len(runs)} losses, {arguments.steps} steps of {arguments.examples} examples")
    for finished in runs:
        table.add_row(*finished.cells())
    console.print(table)
    if arguments.write:
        arguments.write.write_text(as_markdown(runs, arguments))


if __name__ == "__main__":
    main()
