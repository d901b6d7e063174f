"""What the recipes share: their own switches, the command line, and loading the data.

A recipe says what is trained and how. This file has only what would otherwise be the same lines in each of them.
"""

import json
import random
import runpy
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_files import load_splits
from datasets import Dataset, IterableDataset
from loss_lines import without_other_loss
from model_options import check_model_options, loading_arguments
from short_help import short_help
from splits import evaluation_split, training_split, without_evaluation
from trl import ModelConfig, ScriptArguments, TrlParser

from hf_prefopt import PreferenceConfig, PreferenceTrainer
from hf_prefopt.callbacks import GenerationEvalCallback
from hf_prefopt.config_names import hints_in
from hf_prefopt.console import use_short_progress

# What the report at the end suggests.
NEXT_STEPS = {
    "another model": "--model_name_or_path HuggingFaceTB/SmolLM2-360M-Instruct",
    "your preferences": "--dataset_name your-name/your-pairs   (columns: prompt, chosen, rejected)",
    "another loss": "--loss_type simpo",
    "share the result": "--push_to_hub --hub_model_id your-name/your-model",
}


@dataclass
class RecipeArguments:
    """Switches of the recipes themselves, beside those of the trainer, the model and the data."""

    train_rows: int | None = field(
        default=None, metadata={"help": "Train on N rows, drawn at random; all of them if there are fewer."}
    )
    eval_rows: int | None = field(default=None, metadata={"help": "Evaluate on N rows, drawn at random."})
    longest_row: int | None = field(
        default=None, metadata={"help": "Leave out rows with more than N characters, prompt and responses together."}
    )
    gsm8k_problems: int = field(
        default=0, metadata={"help": "Solve N GSM8K problems (at most 200) at every evaluation; 0 for none."}
    )
    losses_from: str | None = field(
        default=None, metadata={"help": "A Python file that registers losses of your own; it is run first."}
    )

    def __post_init__(self):
        if self.losses_from:
            runpy.run_path(self.losses_from)


# PEFT asks transformers for an attribute under its old name: one known line of noise, at every start, that is not ours.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


class RecipeParser(TrlParser):
    """trl's parser, of which a YAML file's loss keeps its hyperparameters to itself."""

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        return super().set_defaults_with_config(**without_other_loss(settings, sys.argv[1:]))


def parse_arguments(
    adapter: bool, quantized: bool = False
) -> tuple[ScriptArguments, PreferenceConfig, ModelConfig, RecipeArguments]:
    """The arguments of the YAML file `--config`, overridden by those of the command line; what is wrong ends the run.

    Args:
        adapter: whether the recipe trains an adapter. quantized: whether it quantizes the model beneath.
    """
    if {"-h", "--help"}.intersection(sys.argv):
        print(short_help(sys.modules["__main__"].__doc__ or "", RecipeArguments))
        sys.exit()
    sys.argv = ["--help" if argument == "--help_all" else argument for argument in sys.argv]
    # RecipeArguments come first, because `losses_from` registers losses that PreferenceConfig looks up.
    parser = RecipeParser((RecipeArguments, ScriptArguments, PreferenceConfig, ModelConfig))
    try:
        recipe, script, training, model = parser.parse_args_and_config()
        for name, value in (("dataset_name", script.dataset_name), ("model_name_or_path", model.model_name_or_path)):
            if value is None:
                parser.error(f"--{name} is missing: pass it, or a YAML file that has it by --config")
        check_model_options(model, adapter, quantized)
        _refuse_unused(script, training)
        training.model_init_kwargs = loading_arguments(model, training.model_init_kwargs)
    except ValueError as error:
        sys.exit(f"error: {error}{hints_in(str(error))}")
    if training.process_index == 0 and Path(training.output_dir, "README.md").is_file():
        print(f"{training.output_dir} holds an earlier run, whose files are written over: --output_dir", flush=True)
    return script, training, model, recipe


def _refuse_unused(script: ScriptArguments, training: PreferenceConfig) -> None:
    """Raise `ValueError` for options of scripts in general that the recipes do nothing with."""
    if script.ignore_bias_buffers:
        raise ValueError("ignore_bias_buffers=True has no effect: leave it out; --ddp_broadcast_buffers false is close")
    if training.do_predict:
        raise ValueError("do_predict=True has no effect: recipes train and evaluate; leave it out")


def load_pairs(
    script: ScriptArguments, recipe: RecipeArguments, training: PreferenceConfig
) -> tuple[Dataset, Dataset | None]:
    """The training rows and, where the data set has such a split, the evaluation rows: see `data_files.py`."""
    try:
        splits = load_splits(script.dataset_name, script.dataset_config, script.dataset_streaming)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if recipe.longest_row is not None:
        splits = splits.filter(lambda row: characters(row) <= recipe.longest_row)
    train = training_split(splits, script.dataset_train_split)
    test = evaluation_split(splits, script.dataset_test_split, trained=script.dataset_train_split)
    if test is None:
        without_evaluation(training)
    how = draw_prompts if training.group_by_prompt else draw
    return how(train, recipe.train_rows, training.seed), test and how(test, recipe.eval_rows, training.seed)


def characters(value: Any) -> int:
    """The length of all texts in a row, or in whatever it is made of; names of roles count too."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(characters, parts))


def draw(rows: Dataset | IterableDataset, count: int | None, seed: int) -> Dataset | IterableDataset:
    """So many rows at random, the same ones for the same seed, in their order; all of them without a count.

    Of a stream, its first ones.
    """
    if count is None:
        return rows
    if isinstance(rows, IterableDataset):
        return rows.take(count)
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows)))))


def draw_prompts(rows: Dataset | IterableDataset, count: int | None, seed: int) -> Dataset | IterableDataset:
    """As `draw`, but prompts at random with all their rows; of the last one as many as are left to take.

    Rows without a column `prompt`, whose responses begin with it, are drawn one by one.
    """
    if count is None or isinstance(rows, IterableDataset) or "prompt" not in rows.column_names:
        return draw(rows, count, seed)
    rows_of: dict[str, list[int]] = {}
    for number, prompt in enumerate(rows["prompt"]):
        rows_of.setdefault(json.dumps(prompt), []).append(number)
    prompts = random.Random(seed).sample(list(rows_of), len(rows_of))
    return rows.select(sorted([number for prompt in prompts for number in rows_of[prompt]][:count]))


def watch(trainer: PreferenceTrainer, recipe: RecipeArguments) -> None:
    """Short progress lines, and GSM8K at every evaluation where it is asked for."""
    use_short_progress(trainer)
    if recipe.gsm8k_problems:
        trainer.add_callback(GenerationEvalCallback(trainer, limit=recipe.gsm8k_problems))
