"""The settings of a run from YAML files and the command line, checked before data or models are loaded."""

import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.recipe.adapters import ADAPTER_LEARNING_RATE, check_model_options, loading_arguments, trains_adapter
from hf_prefopt.recipe.config_files import COMMAND_LINE, Layer, read_layers
from hf_prefopt.recipe.data import check_data_options
from hf_prefopt.recipe.layers import merged
from hf_prefopt.recipe.options import DataOptions, ModelOptions, RunOptions


@dataclass(frozen=True)
class Recipe:
    """The complete settings of a run.

    Attributes:
        run, data, model, training: The settings, by the dataclass to which they belong.
        settings: All settings that were given, keyed by name, in the form in which they are saved in a YAML file.
        environment: Names of the environment variables that files set.
        command_line: The command line as a list of words.
    """

    run: RunOptions
    data: DataOptions
    model: ModelOptions
    training: PreferenceConfig
    settings: dict[str, Any]
    environment: tuple[str, ...]
    command_line: Sequence[str]

    @property
    def data_names(self) -> str | list[str]:
        """The names of the datasets, for the model card."""
        return [entry.path for entry in self.data.entries] if self.data.datasets else str(self.data.dataset_name)


def read_recipe(options: Namespace) -> Recipe:
    """Build the recipe from the options of `train`.

    Raises:
        ValueError: If a setting is unknown, missing or without effect, or has an invalid value.
    """
    given = {name: getattr(options, name) for name in options.known if hasattr(options, name)}
    files = read_layers(options.config, options.known)
    script = Layer("the script", getattr(options, "script", {}), {})
    settings = merged([script, *files, Layer(COMMAND_LINE, given, {})], _say)
    environment = {name: value for file in files for name, value in file.environment.items()}
    os.environ.update(environment)
    _refuse_missing(settings)
    for loss in settings.get("loss_type", ()):
        if "," in loss:
            raise ValueError(f"loss_type='{loss}': separate losses with spaces, --loss_type {loss.replace(',', ' ')}")
    # This comes first, because `losses_from` registers losses that PreferenceConfig looks up.
    run = RunOptions(**_of(RunOptions, settings))
    settings.setdefault("output_dir", "runs/" + "+".join(settings.get("loss_type", ["dpo"])))
    data, model = DataOptions(**_of(DataOptions, settings)), ModelOptions(**_of(ModelOptions, settings))
    check_model_options(model)
    check_data_options(data)
    if "learning_rate" not in settings and trains_adapter(model):
        settings["learning_rate"] = ADAPTER_LEARNING_RATE
        _say(f"learning_rate={ADAPTER_LEARNING_RATE:g}: the default for an adapter; --learning_rate sets another")
    training = PreferenceConfig(**_of(PreferenceConfig, settings))
    if training.do_predict:
        raise ValueError("do_predict=True has no effect: `train` trains and evaluates; leave it out")
    others = cast("dict[str, Any] | None", training.model_init_kwargs)  # parsed from JSON by now
    training.model_init_kwargs = loading_arguments(model, others)
    return Recipe(run, data, model, training, settings, tuple(environment), options.command_line)


def _of(kind: type, settings: dict[str, Any]) -> dict[str, Any]:
    return {field.name: settings[field.name] for field in fields(kind) if field.name in settings}


def _refuse_missing(settings: dict[str, Any]) -> None:
    if not settings.get("dataset_name") and not settings.get("datasets"):
        raise ValueError("the dataset is missing: pass --dataset_name, or set it in a YAML file passed with --config")
    if not settings.get("model_name_or_path"):
        raise ValueError(
            "the model is missing: pass --model_name_or_path, or set it in a YAML file passed with --config"
        )


def _say(line: str) -> None:
    """Print a line, only on the first rank."""
    if not int(os.environ.get("RANK", 0)):
        print(line, flush=True)
