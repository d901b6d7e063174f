"""What the recipes share: their own switches, the command line, and loading the data.

A recipe says what is trained and how. This file has only what would otherwise be the same lines in each of them.
"""

import json
import random
import runpy
import sys
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_lines import without_demo_limits
from datasets import Dataset, IterableDataset
from loss_lines import without_other_loss
from mixture import load_mixture, read_entries
from model_options import check_model_options, loading_arguments
from short_help import short_help
from trl import ModelConfig, ScriptArguments, TrlParser

from hf_prefopt import Mixture, PreferenceConfig, PreferenceTrainer, split_by_prompt
from hf_prefopt.callbacks import GenerationEvalCallback
from hf_prefopt.config_names import hints_in
from hf_prefopt.console import use_short_progress
from hf_prefopt.data.files import load_splits
from hf_prefopt.data.splits import HELD_BACK, describe_splits, evaluation_split, training_split
from hf_prefopt.recording import BeforeAndAfter

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

    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "A mixture of data sets instead of dataset_name: paths, or entries with path, weight and more; see "
            "recipes/mixture.py."
        },
    )
    test_split_size: float | None = field(
        default=None,
        metadata={
            "help": "Hold out this share of the rows to evaluate, above 0 and below 1, by whole prompts, in place of a "
            "split for it."
        },
    )
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
        self.datasets = read_entries(self.datasets) if self.datasets else None
        if self.losses_from:
            runpy.run_path(self.losses_from)


# PEFT asks transformers for an attribute under its old name: one known line of noise, at every start, that is not ours.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


class RecipeParser(TrlParser):
    """trl's parser, of which a YAML file's loss keeps its hyperparameters to itself, and its demo data their limits."""

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        settings = without_demo_limits(settings, sys.argv[1:], PreferenceConfig.max_length)
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
        data = script.dataset_name or recipe.datasets
        for name, value in (("dataset_name", data), ("model_name_or_path", model.model_name_or_path)):
            if value is None:
                parser.error(f"--{name} is missing: pass it, or a YAML file that has it by --config")
        check_model_options(model, adapter, quantized)
        _refuse_unused(script, training, recipe)
        training.model_init_kwargs = loading_arguments(model, training.model_init_kwargs)
    except ValueError as error:
        sys.exit(f"error: {error}{hints_in(str(error))}")
    if recipe.datasets:
        script.dataset_name = [entry.path for entry in recipe.datasets]  # for the model card
    if training.process_index == 0 and Path(training.output_dir, "README.md").is_file():
        print(f"{training.output_dir} holds an earlier run, whose files are written over: --output_dir", flush=True)
    return script, training, model, recipe


def _refuse_unused(script: ScriptArguments, training: PreferenceConfig, recipe: RecipeArguments) -> None:
    """Raise `ValueError` for options that would have no effect."""
    if script.ignore_bias_buffers:
        raise ValueError("ignore_bias_buffers=True has no effect: leave it out; --ddp_broadcast_buffers false is close")
    if training.do_predict:
        raise ValueError("do_predict=True has no effect: recipes train and evaluate; leave it out")
    if recipe.test_split_size is not None and script.dataset_test_split != "test":
        raise ValueError(
            f"test_split_size={recipe.test_split_size} holds rows out, and dataset_test_split="
            f"{script.dataset_test_split} names a split to evaluate: give one of them"
        )
    if not recipe.datasets:
        return
    unused = {name: getattr(script, name) for name in ("dataset_name", "dataset_config") if getattr(script, name)}
    unused |= {name: value for name in ("train_rows", "eval_rows") if (value := getattr(recipe, name)) is not None}
    for name, default in (("dataset_train_split", "train"), ("dataset_test_split", "test")):
        unused |= {name: value} if (value := getattr(script, name)) != default else {}
    if unused:
        given = ", ".join(f"{name}={value}" for name, value in unused.items())
        raise ValueError(f"{given} beside datasets: give path, name, split and weight in the entries of datasets")


Rows = Dataset | IterableDataset | Mixture


def load_pairs(
    script: ScriptArguments, recipe: RecipeArguments, training: PreferenceConfig
) -> tuple[Rows, Rows | None]:
    """The training rows and, where there are any, the evaluation rows."""
    try:
        train, test = _load_mixture(script, recipe, training) if recipe.datasets else _load(script, recipe, training)
        if test is None:
            _without_evaluation(training)
    except ValueError as error:
        sys.exit(f"error: {error}")
    return train, test


def _load(script: ScriptArguments, recipe: RecipeArguments, training: PreferenceConfig) -> tuple[Rows, Rows | None]:
    """The rows of `dataset_name`: see `hf_prefopt.data.files` and `.splits`."""
    splits = load_splits(script.dataset_name, script.dataset_config, script.dataset_streaming)
    trained = training_split(splits, script.dataset_train_split)
    train, evaluated = _not_too_long(splits[trained], recipe), None
    if recipe.test_split_size is None:
        evaluated = evaluation_split(splits, script.dataset_test_split, trained)
        test = _not_too_long(splits[evaluated], recipe) if evaluated else None
    elif isinstance(train, IterableDataset):
        raise ValueError("test_split_size: a stream has no length to hold a share out of: name a split to evaluate")
    else:
        train, test = split_by_prompt(train, recipe.test_split_size, training.seed, **_reading(training))
        _say(
            training,
            f"{len(test):,} rows are held out to evaluate, {len(train):,} are trained on; no prompt is in both.",
        )
    _say(training, describe_splits(splits, trained, evaluated))
    how = draw_prompts if training.group_by_prompt else draw
    train = how(train, recipe.train_rows, training.seed)
    return train, how(test, recipe.eval_rows, training.seed) if test is not None else None


def _load_mixture(
    script: ScriptArguments, recipe: RecipeArguments, training: PreferenceConfig
) -> tuple[Mixture, Mixture | None]:
    """The rows of `datasets`: see `mixture.py`."""
    keep = partial(_not_too_long, recipe=recipe)
    train, test = load_mixture(recipe.datasets, script.dataset_streaming, training.seed, keep, _reading(training))
    if recipe.test_split_size is not None:
        train, test = train.hold_out(recipe.test_split_size)
    if test is not None:
        names = ", ".join(f"{source.name}" for source in test.sources)
        _say(training, f"Evaluated are {'held-out rows' if recipe.test_split_size else 'splits'} of {names}.")
    return train, test


def _without_evaluation(training: PreferenceConfig) -> None:
    """Turn evaluation off, and print a line about it."""
    if training.load_best_model_at_end:
        raise ValueError("load_best_model_at_end=True, but the data set has no split to evaluate: set it to false")
    training.eval_on_start, training.eval_strategy = False, "no"
    if training.process_index == 0:
        print(
            f"No split to evaluate ({', '.join(HELD_BACK)}): training without evaluation; --test_split_size 0.05 holds "
            "rows out.",
            flush=True,
        )


def _reading(training: PreferenceConfig) -> dict[str, Any]:
    """The settings that say how columns are read."""
    return {name: getattr(training, name) for name in ("column_mapping", "remove_columns", "text_as")}


def _not_too_long(rows: Any, recipe: RecipeArguments) -> Any:
    longest = recipe.longest_row
    return rows if longest is None else rows.filter(lambda row: characters(row) <= longest)


def _say(training: PreferenceConfig, line: str | None) -> None:
    if line and training.process_index == 0:
        print(line, flush=True)


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
    """Short progress lines, answers from before and after training, and GSM8K where it is asked for."""
    use_short_progress(trainer)
    trainer.add_callback(BeforeAndAfter(trainer))
    if recipe.gsm8k_problems:
        trainer.add_callback(GenerationEvalCallback(trainer, limit=recipe.gsm8k_problems))
