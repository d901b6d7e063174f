"""Train a model on preference data: a LoRA adapter, a LoRA adapter on a 4-bit model, or all weights.

With evaluation data, the policy is evaluated after training, and also before training if `eval_on_start` is set. The
output folder contains the adapter or the model, its model card, the training curves, and the settings with the command
(train.yaml).
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
from hf_prefopt.recipe.kept import check_places, keep_settings, refuse_other_run
from hf_prefopt.recipe.options import DataOptions, ModelOptions, RunOptions
from hf_prefopt.recipe.settings import Recipe, read_recipe
from hf_prefopt.recipe.shipped import copy, listing
from hf_prefopt.recording import BeforeAndAfter
from hf_prefopt.trainer import PreferenceTrainer

# PEFT reads an attribute that transformers has deprecated. Without this filter, every run would print a warning.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def add_options(parser: CommandParser) -> None:
    """Add the options of `train`: one per setting, and `--list`, `--copy` and `--config`."""
    parser.usage, parser.short_help = "%(prog)s [--config FILE ...] [--setting value ...]", HELP
    parser.add_full_help()
    parser.add_argument("--list", action="store_true", help="list the recipes and the engine configurations")
    parser.add_argument(
        "--copy", nargs="+", metavar=("NAME", "FOLDER"), help="copy a recipe or engine configuration into a folder"
    )
    parser.add_argument(
        "--config",
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="YAML files; later ones override earlier ones",
    )
    parser.add_settings("Run", RunOptions)
    parser.add_settings("Data", DataOptions)
    parser.add_settings("Model and adapter", ModelOptions)
    parser.add_settings("Losses, training, the Trainer", PreferenceConfig)
    parser.set_defaults(known=parser.settings())


def run(options: Namespace) -> int:
    """Train. With `--list` or `--copy`, list or copy files shipped with the package instead."""
    if options.list:
        print(listing())
    elif options.copy:
        for line in copy(*options.copy):
            print(line)
    else:
        train(read_recipe(options))
    return 0


def recipe(**defaults: Any) -> NoReturn:
    """Run the command `train` from a script, with the arguments of the process, and exit.

    Args:
        defaults: Default settings from the script. YAML files and the command line override them.
    """
    parser = parser_of(sys.modules[__name__], sys.argv[0])
    options = parser.parse_args()
    options.command_line, options.script = ["python", *sys.argv], defaults
    sys.exit(reported(lambda: run(options), options.traceback, parser.option_names()))


def train(recipe: Recipe) -> None:
    """Run a recipe: load the data and the model, train, evaluate, save, and write the report."""
    training, data, model = recipe.training, recipe.data, recipe.model
    check_places(recipe)
    refuse_other_run(recipe)
    check_model_is_there(model)
    set_seed(training.seed)  # before the adapter is initialized
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
    # The evaluation before training runs inside train() (`eval_on_start`), after the engine is set up.
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if test_rows is not None:
        trainer.evaluate()
    trainer.save_model()
    finish_run(trainer, recipe.data_names, next_steps(training))
    trainer.accelerator.end_training()  # a process that exits inside a process group may crash


def next_steps(training: PreferenceConfig) -> dict[str, str]:
    """Return the commands that the final summary suggests, keyed by purpose."""
    loss = "simpo" if "simpo" not in training.loss_type else "dpo"
    return {
        "another model": "--model_name_or_path HuggingFaceTB/SmolLM2-360M-Instruct",
        "your preferences": "--dataset_name your-name/your-pairs   (columns: prompt, chosen, rejected)",
        "another loss": f"--loss_type {loss} --output_dir runs/{loss}",
        "compare the two": f"hf_prefopt compare {training.output_dir} runs/{loss}",
        "share the result": "--push_to_hub --hub_model_id your-name/your-model",
    }
