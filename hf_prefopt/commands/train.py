"""Train a model on preference data: a LoRA adapter, one on 4 bits, or all weights.

The policy is evaluated before and after where the YAML file says `eval_on_start`; what is saved is the adapter or the
model, with its model card, its training curves, the settings (train.yaml) and the command that made it.
"""

import sys
import warnings
from argparse import Namespace
from typing import Any, NoReturn

from transformers import set_seed

from hf_prefopt.callbacks import GenerationEvalCallback
from hf_prefopt.commands.faults import reported
from hf_prefopt.commands.parser import CommandParser, parser_of
from hf_prefopt.config import PreferenceConfig
from hf_prefopt.console import finish_run, use_short_progress
from hf_prefopt.recipe.adapters import check_model_is_there, lora_of, quantization_of
from hf_prefopt.recipe.data import load_pairs
from hf_prefopt.recipe.help import HELP
from hf_prefopt.recipe.kept import keep_settings, refuse_other_run
from hf_prefopt.recipe.options import DataOptions, ModelOptions, RunOptions
from hf_prefopt.recipe.settings import Recipe, read_recipe
from hf_prefopt.recipe.shipped import copy, listing
from hf_prefopt.recording import BeforeAndAfter
from hf_prefopt.trainer import PreferenceTrainer

# PEFT asks transformers for an attribute under its old name: one known line of noise, at every start, that is not ours.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def add_options(parser: CommandParser) -> None:
    """The options of `train`: one for every setting, and those that do something else than train."""
    parser.usage, parser.short_help = "%(prog)s [--config FILE ...] [--setting value ...]", HELP
    parser.add_full_help()
    parser.add_argument("--list", action="store_true", help="list the recipes and the engine configurations")
    parser.add_argument("--copy", nargs="+", metavar=("NAME", "FOLDER"), help="copy one of them into a folder")
    parser.add_argument(
        "--config", action="extend", nargs="+", default=[], metavar="FILE", help="YAML files; last wins"
    )
    parser.add_settings("Run", RunOptions)
    parser.add_settings("Data", DataOptions)
    parser.add_settings("Model and adapter", ModelOptions)
    parser.add_settings("Losses, training, the Trainer", PreferenceConfig)
    parser.set_defaults(known=parser.settings())


def run(options: Namespace) -> int:
    """Train, or list or copy what comes with the package."""
    if options.list:
        print(listing())
    elif options.copy:
        for line in copy(*options.copy):
            print(line)
    else:
        train(read_recipe(options))
    return 0


def recipe(**defaults: Any) -> NoReturn:
    """Run `train` as a script with the command line of the process, and end it.

    Args:
        defaults: settings of the script, which YAML files and the command line override.
    """
    parser = parser_of(sys.modules[__name__], sys.argv[0])
    options = parser.parse_args()
    options.command_line, options.script = ["python", *sys.argv], defaults
    sys.exit(reported(lambda: run(options), options.traceback, parser.option_names()))


def train(recipe: Recipe) -> None:
    """The recipe, from the settings to the report."""
    training, data, model = recipe.training, recipe.data, recipe.model
    refuse_other_run(recipe)
    check_model_is_there(model)
    set_seed(training.seed)  # before the adapter is drawn
    train_rows, test_rows = load_pairs(data, training)
    trainer = PreferenceTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=train_rows,
        eval_dataset=test_rows,
        peft_config=lora_of(model),
        quantization_config=quantization_of(model),
    )
    use_short_progress(trainer)
    trainer.add_callback(BeforeAndAfter(trainer))
    if recipe.run.gsm8k_problems:
        trainer.add_callback(GenerationEvalCallback(trainer, limit=recipe.run.gsm8k_problems))
    keep_settings(recipe)
    # `eval_on_start` makes the evaluation before: inside train(), where every engine is set up.
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if test_rows is not None:
        trainer.evaluate()
    trainer.save_model()
    finish_run(trainer, recipe.data_names, next_steps(training))


def next_steps(training: PreferenceConfig) -> dict[str, str]:
    """What the summary at the end of a run suggests, keyed by purpose."""
    loss = "simpo" if "simpo" not in training.loss_type else "dpo"
    return {
        "another model": "--model_name_or_path HuggingFaceTB/SmolLM2-360M-Instruct",
        "your preferences": "--dataset_name your-name/your-pairs   (columns: prompt, chosen, rejected)",
        "another loss": f"--loss_type {loss} --output_dir runs/{loss}",
        "compare the two": f"hf_prefopt compare {training.output_dir} runs/{loss}",
        "share the result": "--push_to_hub --hub_model_id your-name/your-model",
    }
