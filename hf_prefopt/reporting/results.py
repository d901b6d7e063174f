"""The results of a run as a table: before and after training, with intervals, beside what needs no training.

From the record of the run, so that terminal, model card, report and comparison show the same.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_prefopt.reporting.intervals import Accuracy, accuracy_of, wilson_interval
from hf_prefopt.reporting.observed import correct
from hf_prefopt.reporting.record import RunRecord

LONGER, UNTRAINED = "always the longer one", "the untrained model's log-probs"

# What an evaluation says of itself and not of the model.
_BOOKKEEPING = ("runtime", "per_second", "preparation_time", "epoch", "step")


@dataclass(frozen=True)
class Shown:
    """A row of the table: the metric's name after the prefix of its data set, its label, how it is written, and for a
    share the name of its sample size."""

    key: str
    label: str
    form: str = "{:+.4f}"
    share_of: str | None = None


SHOWN = (
    Shown("loss", "loss", "{:.4f}"),
    Shown("rewards/accuracies", "reward accuracy", "{:.3f}"),
    Shown("log_ratios/accuracies", "log-ratio accuracy", "{:.3f}"),
    Shown("rewards/margins", "reward margin"),
    Shown("rewards/chosen", "chosen reward"),
    Shown("rewards/rejected", "rejected reward"),
    Shown("rewards/best", "best reward"),
    Shown("log_ratios/chosen", "Δ log p of chosen, per token"),
    Shown("log_ratios/rejected", "Δ log p of rejected, per token"),
    Shown("log_ratios/responses", "Δ log p, per token"),
    Shown("ref_kl", "KL to the reference, per token", "{:.4f}"),
    Shown("gsm8k/exact_match", "GSM8K exact match", "{:.3f}", "gsm8k/problems"),
)


@dataclass(frozen=True)
class Results:
    """What an evaluation says before and after training.

    Attributes:
        before, after: metrics without their prefix; `None` where there was no such evaluation.
        accuracies: "before" and "after", with intervals that count prompts as independent.
        baselines: accuracies of rules that need no training, by name.
        examples: how many examples were evaluated; `None` if unknown.
    """

    before: Mapping[str, float] | None = None
    after: Mapping[str, float] | None = None
    accuracies: Mapping[str, Accuracy] = field(default_factory=dict)
    baselines: Mapping[str, Accuracy] = field(default_factory=dict)
    examples: int | None = None

    @property
    def columns(self) -> list[tuple[str, Mapping[str, float]]]:
        """The evaluations that there are."""
        both = (("before", self.before), ("after", self.after))
        return [(name, metrics) for name, metrics in both if metrics is not None]

    def rows(self) -> list[tuple[str, list[str]]]:
        """Labels, and a cell for each of `columns`."""
        found: list[tuple[str, list[str]]] = []
        if self.after is None:
            return found
        for shown in SHOWN:
            if shown.key not in self.after or self._says_the_same(shown):
                continue
            found.append((shown.label, [self._cell(shown, name, metrics) for name, metrics in self.columns]))
            if shown.key == self._measured:
                found += [
                    (f"  {name}", [""] * (len(self.columns) - 1) + [str(a)]) for name, a in self.baselines.items()
                ]
        return found

    @property
    def _measured(self) -> str:
        """The accuracy that `accuracies` has: of the loss's rewards or, if it has none, of log-ratios."""
        names = ("rewards/accuracies", "log_ratios/accuracies")
        return next((name for name in names if name in (self.after or {})), "")

    def _says_the_same(self, shown: Shown) -> bool:
        """The accuracy of log-ratios beside that of the rewards they are, as in DPO."""
        pair = ("log_ratios/accuracies", "rewards/accuracies")
        values = [[metrics.get(key) for _, metrics in self.columns] for key in pair]
        return shown.key == pair[0] and values[0] == values[1]

    def _cell(self, shown: Shown, column: str, metrics: Mapping[str, float]) -> str:
        if shown.key not in metrics:
            return "–"
        value = float(metrics[shown.key]) + 0.0  # a negative zero becomes a plain one
        if shown.key == self._measured and column in self.accuracies:
            return str(self.accuracies[column])
        size = metrics.get(shown.share_of or "")
        if shown.share_of is None or not size:
            return shown.form.format(value)
        low, high = wilson_interval(value, size)
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def results_of(record: RunRecord, name: str = "eval") -> Results:
    """The results of one data set.

    Args:
        name: the prefix of its metrics.
    """
    before, after = first_evaluation(record.logs, name), last_evaluation(record.logs, name)
    known = [entry for entry in record.accuracies if entry["set"] == name]
    examples = [entry for entry in record.examples if entry["set"] == name]
    accuracies = {}
    if known:
        first, last = known[0], known[-1]
        accuracies = {"after": _accuracy(last)} | ({"before": _accuracy(first)} if first["step"] == 0 else {})
    prefix = f"{name}_"
    return Results(
        {key.removeprefix(prefix): value for key, value in before.items()} if before else None,
        {key.removeprefix(prefix): value for key, value in after.items()} if after else None,
        accuracies,
        baselines(examples),
        len(examples) or None,
    )


def evaluated_sets(record: RunRecord) -> list[str]:
    """The prefixes of the data sets that were evaluated."""
    return list(record.run.get("sets") or ["eval"])


def baselines(examples: list[dict[str, Any]]) -> dict[str, Accuracy]:
    """The accuracy of "the longer response is the better one", and of the reference's own log-probs."""
    if not examples:
        return {}
    prompts = [entry["prompt"] for entry in examples]
    lengths = np.array([entry["lengths"] for entry in examples], dtype=float)
    reference = np.array([entry["reference_margin"] for entry in examples], dtype=float)
    found = {
        LONGER: accuracy_of(correct(lengths[:, 0] - lengths[:, 1]), prompts),
        UNTRAINED: accuracy_of(correct(reference), prompts),
    }
    return {name: accuracy for name, accuracy in found.items() if accuracy is not None}


def _accuracy(entry: dict[str, Any]) -> Accuracy:
    return Accuracy(**{name: entry[name] for name in ("value", "low", "high", "examples", "prompts")})


def first_evaluation(log_history: Iterable[Mapping[str, float]], name: str = "eval") -> dict[str, float] | None:
    """The evaluation on start, callbacks' results included; `None` where the run did not evaluate before training.

    Args:
        name: the prefix of the metrics, which several evaluation sets have of their own.
    """
    return _evaluation_at(0, log_history, name) or None


def last_evaluation(log_history: Iterable[Mapping[str, float]], name: str = "eval") -> dict[str, float]:
    """The evaluation at the latest step that has one, callbacks' results included; empty where there is none."""
    records = list(log_history)
    steps = [record["step"] for record in records if any(key.startswith(f"{name}_") for key in record)]
    return _evaluation_at(max(steps), records, name) if steps else {}


def _evaluation_at(step: float, log_history: Iterable[Mapping[str, float]], name: str) -> dict[str, float]:
    """Everything that was evaluated at a step; a later record of the same step wins."""
    found: dict[str, float] = {}
    for record in log_history:
        if record["step"] == step:
            found |= {key: value for key, value in record.items() if key.startswith(f"{name}_")}
    return {key: value for key, value in found.items() if not key.endswith(_BOOKKEEPING)}
