"""Loading of the training and evaluation rows, from `dataset_name` or from `datasets`."""

import json
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.files import load_splits
from hf_prefopt.data.held_out import split_by_prompt
from hf_prefopt.data.mixtures import Mixture
from hf_prefopt.data.splits import HELD_BACK, describe_splits, evaluation_split, training_split
from hf_prefopt.recipe.draw import draw, draw_prompts, not_too_long
from hf_prefopt.recipe.mixture import load_mixture
from hf_prefopt.recipe.options import DataOptions
from hf_prefopt.recipe.shipped import SHIPPED_DATA, shipped

Rows: TypeAlias = Dataset | IterableDataset | Mixture


def check_data_options(data: DataOptions) -> None:
    """Raise `ValueError` for options that have no effect or contradict each other."""
    if data.ignore_bias_buffers:
        raise ValueError(
            "ignore_bias_buffers=True has no effect: leave it out; --ddp_broadcast_buffers false is similar"
        )
    if data.test_split_size is not None and data.dataset_test_split != "test":
        raise ValueError(
            f"test_split_size={data.test_split_size} holds rows out, and dataset_test_split="
            f"{data.dataset_test_split} names a split to evaluate: pass only one of them"
        )
    if data.dataset_config and data.dataset_name and Path(data.dataset_name).exists():
        raise ValueError(
            f"dataset_config={data.dataset_config}: {data.dataset_name} is on this machine and has no configurations: "
            "leave it out"
        )
    if not data.datasets:
        return
    names = ("dataset_name", "dataset_config", "train_rows", "eval_rows")
    unused = {name: value for name in names if (value := getattr(data, name)) is not None}
    for name, default in (("dataset_train_split", "train"), ("dataset_test_split", "test")):
        unused |= {name: value} if (value := getattr(data, name)) != default else {}
    if unused:
        raise ValueError(_no_mixture(unused))


_OF_ENTRIES = {"dataset_name": "path", "dataset_config": "name", "dataset_train_split": "split"}


def _no_mixture(unused: dict[str, Any]) -> str:
    """Return the error message for settings that must be part of an entry of `datasets` if `datasets` is set."""
    given = " and ".join(f"{name}={value}" for name, value in unused.items())
    entry = {_OF_ENTRIES[name]: value for name, value in unused.items() if name in _OF_ENTRIES}
    one, other = ("'" + json.dumps(example) + "'" for example in ({"path": "a.jsonl"} | entry, {"path": "b.jsonl"}))
    return (
        f"{given} cannot be combined with --datasets: for one dataset remove --datasets; for several write each as an "
        f"entry, such as --datasets {one} {other}"
    )


def load_pairs(data: DataOptions, training: PreferenceConfig) -> tuple[Rows, Rows | None]:
    """Load the training rows and the evaluation rows. Without evaluation rows, evaluation is turned off.

    Raises:
        ValueError: If the data cannot be loaded or a split does not exist.
    """
    train, test = _load_mixture(data, training) if data.datasets else _load(data, training)
    if test is None:
        _without_evaluation(training)
    return train, test


def _load(data: DataOptions, training: PreferenceConfig) -> tuple[Rows, Rows | None]:
    """Load the rows of `dataset_name`; see `hf_prefopt.data.files` and `hf_prefopt.data.splits`."""
    splits = load_splits(_found(str(data.dataset_name)), data.dataset_config, data.dataset_streaming)
    trained = training_split(splits, data.dataset_train_split)
    train, evaluated = not_too_long(splits[trained], data.longest_row), None
    if data.test_split_size is None:
        evaluated = evaluation_split(splits, data.dataset_test_split, trained)
        test = not_too_long(splits[evaluated], data.longest_row) if evaluated else None
    elif isinstance(train, IterableDataset):
        raise ValueError(
            "test_split_size: no share of a stream can be held out, as its length is unknown: name a split to evaluate"
        )
    else:
        train, test = split_by_prompt(train, data.test_split_size, training.seed, **_reading(training))
        held_out = f"{len(test):,} rows are held out to evaluate, {len(train):,} are trained on"
        _say(training, f"{held_out}; no prompt is in both.")
    _say(training, describe_splits(splits, trained, evaluated))
    how = draw_prompts if training.group_by_prompt else draw
    train = how(train, data.train_rows, training.seed)
    return train, how(test, data.eval_rows, training.seed) if test is not None else None


def _found(name: str) -> str:
    """Return the name of a dataset. If the data are shipped with the package, return their path."""
    is_shipped = name.startswith(SHIPPED_DATA) and not Path(name).exists()
    return str(shipped(name)) if is_shipped and shipped(name).exists() else name


def _load_mixture(data: DataOptions, training: PreferenceConfig) -> tuple[Mixture, Mixture | None]:
    """Load the rows of `datasets`; see `hf_prefopt.recipe.mixture`."""
    keep = partial(not_too_long, longest=data.longest_row)
    train, test = load_mixture(data.entries, data.dataset_streaming, training.seed, keep, _reading(training))
    if data.test_split_size is not None:
        train, test = train.hold_out(data.test_split_size)
    if test is not None:
        names = ", ".join(f"{source.name}" for source in test.sources)
        _say(training, f"Evaluation uses {'held-out rows' if data.test_split_size else 'splits'} of {names}.")
    return train, test


def _without_evaluation(training: PreferenceConfig) -> None:
    """Turn evaluation off, and print a message. Raises `ValueError` if `load_best_model_at_end` needs evaluation."""
    if training.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end=True needs rows to evaluate, and the dataset has no split for that: pass "
            "test_split_size=0.05 to hold some out, or load_best_model_at_end=False"
        )
    training.eval_on_start, training.eval_strategy = False, "no"
    _say(
        training,
        f"No split to evaluate ({', '.join(HELD_BACK)}): training without evaluation; --test_split_size 0.05 holds "
        "rows out.",
    )


def _reading(training: PreferenceConfig) -> dict[str, Any]:
    """Return the settings that define how the columns of a dataset are read, keyed by name."""
    return {name: getattr(training, name) for name in ("column_mapping", "remove_columns", "text_as")}


def _say(training: PreferenceConfig, line: str | None) -> None:
    if line and training.process_index == 0:
        print(line, flush=True)
