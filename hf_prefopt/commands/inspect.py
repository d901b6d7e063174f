"""Show how a dataset is read, its statistics, and some rows as the model gets them, without loading a model.

    hf_prefopt inspect pairs.jsonl --model_name_or_path Qwen/Qwen3-0.6B --loss_type dpo --html pairs.html

The exit code is 1 if training on this dataset would raise an error.
"""

import os
from argparse import SUPPRESS, ArgumentParser, Namespace, _ArgumentGroup
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import string_to_bool

from hf_prefopt.commands.parser import json_object
from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.files import load_splits
from hf_prefopt.data.splits import training_split
from hf_prefopt.inspection import inspect_dataset
from hf_prefopt.loading import processing_class_of, tokenizer_of
from hf_prefopt.reporting.inspection_html import write_inspection
from hf_prefopt.reporting.inspection_text import CHARACTERS, print_inspection


def _length(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


# Settings of `PreferenceConfig` that are options of this command, mapped to their arguments of `add_argument`.
SETTINGS: dict[str, dict[str, Any]] = {
    "loss_type": {"nargs": "+", "metavar": "LOSS"},
    "max_length": {"type": _length, "metavar": "TOKENS"},
    "truncation_mode": {"metavar": "MODE"},
    "column_mapping": {"type": partial(json_object, setting="column_mapping"), "metavar": "JSON"},
    "remove_columns": {"nargs": "+", "metavar": "COLUMN"},
    "text_as": {"metavar": "KIND"},
    "chat_template_kwargs": {"type": partial(json_object, setting="chat_template_kwargs"), "metavar": "JSON"},
    "unpair": {"nargs": "?", "const": True, "type": string_to_bool, "metavar": "true"},
    "on_bad_rows": {"metavar": "WHAT"},
    "dataset_num_proc": {"type": int, "metavar": "N"},
}


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `inspect`. Training settings have the same names and help texts as in `train`."""
    parser.usage = "%(prog)s DATA --model_name_or_path MODEL [options]"
    parser.add_argument("data", metavar="DATA", nargs="?", help="a file, a pattern, a folder, or a name on the Hub")
    parser.add_argument("--dataset_name", metavar="DATA", help="another way to name DATA, as in `train`")
    parser.add_argument(
        "--model_name_or_path",
        "--model",
        metavar="MODEL",
        help="the model whose tokenizer is used: a folder or a name on the Hub",
    )
    parser.add_argument("--split", "--dataset_train_split", help="the split to inspect (default: train)")
    parser.add_argument("--dataset_config", metavar="NAME", help="the configuration of a dataset of the Hub")
    parser.add_argument("--dataset_streaming", action="store_true", help="read only the first --stream_rows rows")
    parser.add_argument("--stream_rows", type=int, default=1000, metavar="N", help="rows to read from a stream (1000)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the tokenizer")
    _add_settings(parser.add_argument_group("settings of training"))
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--rows", type=int, default=3, metavar="N", help="the number of rows to show (default: 3)")
    shown.add_argument("--full", action="store_true", help="do not shorten long texts")
    shown.add_argument("--html", type=Path, metavar="FILE", help="also write an HTML page")
    shown.add_argument("--no-color", "--no_color", action="store_true", help="print no colors, as if NO_COLOR were set")


def _add_settings(group: _ArgumentGroup) -> None:
    help_of = {
        setting.name: setting.metadata["help"] for setting in fields(PreferenceConfig) if setting.name in SETTINGS
    }
    for name, how in SETTINGS.items():
        group.add_argument(f"--{name}", default=SUPPRESS, help=help_of[name].replace("%", "%%"), **how)


def run(options: Namespace) -> int:
    """Print the inspection, and write the page if `--html` is given. Raises `ValueError` if the data cannot be read."""
    name = options.data or options.dataset_name
    _refuse_missing(options)
    dataset = _split(name, options)
    tokenizer = _tokenizer(options)
    settings = {name: getattr(options, name) for name in SETTINGS if hasattr(options, name)}
    shown = {"rows": options.rows, "stream_rows": options.stream_rows, "name": name}
    found = inspect_dataset(dataset, tokenizer, **shown, use_cpu=True, **settings)
    console = Console(no_color=options.no_color or None, highlight=False)
    print_inspection(found, console, None if options.full else CHARACTERS)
    if options.html:
        try:
            write_inspection(found, options.html)
        except OSError as error:
            raise ValueError(f"--html {options.html} cannot be written: {error.strerror}") from error
        console.print(Text(f"Page: {options.html}"))
    return 1 if found.errors else 0


def _refuse_missing(options: Namespace) -> None:
    example = "hf_prefopt inspect pairs.jsonl --model_name_or_path Qwen/Qwen3-0.6B"
    if options.data and options.dataset_name:
        raise ValueError(f"{options.data} and --dataset_name {options.dataset_name}: name one dataset")
    if not options.data and not options.dataset_name:
        raise ValueError(f"the dataset is missing: name a file, a folder or a dataset of the Hub, as in {example}")
    if not options.model_name_or_path:
        raise ValueError(f"the model is missing (its tokenizer counts the tokens): pass it, as in {example}")


def _split(name: str, options: Namespace) -> Any:
    """Load the split given by `--split`, or the split that training would use."""
    try:
        splits = load_splits(name, options.dataset_config, options.dataset_streaming)
    except OSError as error:
        raise ValueError(
            f"{name}: there is no such file or folder, and no such dataset on the Hub: {_line(error)}"
        ) from error
    return splits[training_split(splits, options.split or "train", "--split")]


def _tokenizer(options: Namespace) -> PreTrainedTokenizerBase:
    model = os.path.expanduser(options.model_name_or_path)
    try:
        loaded = processing_class_of(model, {"trust_remote_code": True} if options.trust_remote_code else None)
    except OSError as error:
        raise ValueError(
            f"--model_name_or_path {model}: no folder with a tokenizer, and no tokenizer on the Hub: {_line(error)}"
        ) from error
    return tokenizer_of(loaded)


def _line(error: Exception) -> str:
    """Return the first line of an error message."""
    return next(iter(str(error).splitlines()), type(error).__name__)
