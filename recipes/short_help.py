"""`--help` of a recipe: its purpose, and the settings that people use, under headings.

`--help_all` prints every option that the command line takes, most of them the Trainer's.
"""

import argparse
import sys
from dataclasses import Field, fields

from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments

from hf_prefopt import PreferenceConfig
from hf_prefopt.config_docs import default_of, settings_by_group

DATA = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming")
MODEL = (
    "model_name_or_path",
    "dtype",
    "attn_implementation",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "load_in_4bit",
)
TRAINING = (
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "eval_strategy",
    "save_strategy",
    "resume_from_checkpoint",
    "push_to_hub",
    "report_to",
    "seed",
)


def short_help(purpose: str, recipe_arguments: type) -> str:
    """The help as one text.

    Args:
        purpose: the docstring of the recipe.
        recipe_arguments: the dataclass of the recipes' own arguments.
    """
    parser = argparse.ArgumentParser(
        prog=sys.argv[0],
        usage="accelerate launch %(prog)s --config FILE.yaml [--setting value ...]",
        description=purpose,
        epilog="--help_all prints every option. docs/settings.md and docs/losses.md describe settings and losses.",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=120),
        add_help=False,
    )
    groups = {
        "Recipe": list(fields(recipe_arguments)),
        "Data set": _named(ScriptArguments, DATA),
        "Model and adapter": _named(ModelConfig, MODEL),
        "Training": _named(TrainingArguments, TRAINING),
        **settings_by_group(PreferenceConfig),
    }
    for heading, settings in groups.items():
        group = parser.add_argument_group(heading)
        for setting in settings:
            default = default_of(setting)
            text = setting.metadata["help"] + ("" if default is None else f" (default: {default})")
            group.add_argument(f"--{setting.name}", metavar="VALUE", help=text.replace("%", "%%"))
    return parser.format_help()


def _named(dataclass: type, names: tuple[str, ...]) -> list[Field]:
    known = {field.name: field for field in fields(dataclass)}
    return [known[name] for name in names]
