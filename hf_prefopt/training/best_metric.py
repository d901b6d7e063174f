"""Check `metric_for_best_model` before training. The Trainer would raise an error only after the first evaluation."""

from collections.abc import Callable, Iterable
from typing import Any

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.check import only_label
from hf_prefopt.objective.objective import Objective
from hf_prefopt.reporting.metrics import metric_names

_OF_THE_TRAINER = ("runtime", "samples_per_second", "steps_per_second")
# The modules of this package whose callbacks add metrics.
_ADDING = ("hf_prefopt.callbacks", "hf_prefopt.generation.win_rate")


def check_best_metric(
    args: PreferenceConfig,
    objective: Objective,
    evaluated: Any,
    has_own_metrics: bool,
    evaluating: Iterable[Callable[..., Any]],
) -> None:
    """Raise `ValueError` if no evaluation can produce the metric `metric_for_best_model`.

    Args:
        evaluated: The evaluation dataset, or a dict of datasets. The keys of the dict are part of the metrics' names.
        has_own_metrics: True if the user passed `compute_metrics`, which may add metrics of any name.
        evaluating: The trainer's methods that evaluate, and the `on_evaluate` methods of its callbacks. If the user
            has defined one of these functions, it may add metrics, so nothing is checked.
    """
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == "no" or any(map(_may_add_metrics, evaluating)):
        return
    name = metric.removeprefix("eval_")
    rows_of = {f"{key}_": rows for key, rows in evaluated.items()} if isinstance(evaluated, dict) else {"": evaluated}
    sets = list(rows_of)
    if has_own_metrics and name.startswith(tuple(sets)):
        return
    known = metric_names(objective)
    if name not in [of_set + each for of_set in sets for each in (*known, *_OF_THE_TRAINER)]:
        own = ["a name from compute_metrics"] if has_own_metrics else []
        raise ValueError(
            f"metric_for_best_model={metric!r} is not a metric of the evaluation: choose one of "
            f"{', '.join([*own, *(of_set + each for of_set in sets for each in known)])}"
        )
    for of_set, rows in rows_of.items():
        if (label := only_label(rows)) is not None and name.removeprefix(of_set) in _without(label, known):
            raise ValueError(
                f"metric_for_best_model={metric!r} needs {'un' * label}desirable examples, but all examples of the "
                "evaluation data are of the other label: choose another metric, such as the loss, or add such examples"
            )


def _without(label: bool, known: Iterable[str]) -> set[str]:
    """Return the names of the metrics that are missing if all unpaired examples of an evaluation have this label."""
    return {name for name in known if name.endswith(("/rejected" if label else "/chosen", "rewards/margins"))}


def _may_add_metrics(function: Callable[..., Any]) -> bool:
    module = getattr(function, "__module__", "")
    return module.partition(".")[0] not in ("transformers", "hf_prefopt") or module in _ADDING
