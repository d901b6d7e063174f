"""Which splits of a data set are trained on and evaluated, and a run without any to evaluate."""

from collections.abc import Mapping
from typing import Any

from hf_prefopt import PreferenceConfig

# The names that people give to held-back rows, the first one found is taken.
HELD_BACK = ("test", "validation", "valid", "dev", "eval")


def training_split(splits: Mapping[str, Any], name: str) -> Any:
    """The split of that name. Raises `ValueError` with the splits that there are."""
    if name not in splits:
        raise ValueError(
            f"no split {name!r} to train on: there are {', '.join(splits)}; name one: --dataset_train_split"
        )
    return splits[name]


def evaluation_split(splits: Mapping[str, Any], name: str, trained: str) -> Any | None:
    """The split of that name, or of another of the usual ones than the one trained on; `None` where there is none.

    Raises:
        ValueError: a name that is none of the usual ones, so somebody's choice, and no split.
    """
    if name not in (*splits, *HELD_BACK):
        raise ValueError(
            f"no split {name!r} to evaluate: there are {', '.join(splits)}; name one: --dataset_test_split"
        )
    found = (known for known in (name, *HELD_BACK) if known in splits and known != trained)
    return splits.get(next(found, None))


def without_evaluation(training: PreferenceConfig) -> None:
    """Settings of a run that has nothing to evaluate, which one line says."""
    if training.load_best_model_at_end:
        raise ValueError("load_best_model_at_end=True, and the data set has no split to evaluate: set it to false")
    training.eval_on_start, training.eval_strategy = False, "no"
    if training.process_index == 0:
        print(f"No split to evaluate ({', '.join(HELD_BACK)}): training without evaluation.", flush=True)
