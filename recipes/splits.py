"""Which splits of a data set are used for training and evaluation."""

from collections.abc import Mapping
from typing import Any

from hf_prefopt import PreferenceConfig

# Usual names of held-out splits; the first one found is used.
HELD_BACK = ("test", "validation", "valid", "dev", "eval")


def training_split(splits: Mapping[str, Any], name: str) -> Any:
    """The split of that name. Raises `ValueError`, naming the existing splits, if there is none."""
    if name not in splits:
        raise ValueError(
            f"no split {name!r} to train on: there are {', '.join(splits)}; name one: --dataset_train_split"
        )
    return splits[name]


def evaluation_split(splits: Mapping[str, Any], name: str, trained: str) -> Any | None:
    """The split of that name, or one with a usual name that is not trained on; `None` if there is none.

    Raises:
        ValueError: the name is not a usual one, so somebody chose it, and there is no such split.
    """
    if name not in (*splits, *HELD_BACK):
        raise ValueError(
            f"no split {name!r} to evaluate: there are {', '.join(splits)}; name one: --dataset_test_split"
        )
    found = (known for known in (name, *HELD_BACK) if known in splits and known != trained)
    return splits.get(next(found, None))


def without_evaluation(training: PreferenceConfig) -> None:
    """Turn evaluation off, and print a line about it."""
    if training.load_best_model_at_end:
        raise ValueError("load_best_model_at_end=True, but the data set has no split to evaluate: set it to false")
    training.eval_on_start, training.eval_strategy = False, "no"
    if training.process_index == 0:
        print(f"No split to evaluate ({', '.join(HELD_BACK)}): training without evaluation.", flush=True)
