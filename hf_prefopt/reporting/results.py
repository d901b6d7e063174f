"""The results of a run before and after training, with confidence intervals, and baselines that need no training.

They are read from the record of the run. Therefore, the terminal, the model card, the report and comparisons of runs
show the same numbers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_prefopt.reporting.intervals import Accuracy, accuracy_of, wilson_interval
from hf_prefopt.reporting.observed import correct
from hf_prefopt.reporting.record import RunRecord

LONGER, UNTRAINED = "always the longer one", "the untrained model's log-probs"

# Endings of the names of metrics that describe the evaluation and not the model.
_BOOKKEEPING = ("runtime", "per_second", "preparation_time", "epoch", "step")


@dataclass(frozen=True)
class Shown:
    """A row in the table of results.

    Attributes:
        key: Name of the metric, without the prefix of the dataset.
        label: Label in the table.
        form: Format of the value.
        share_of: If the metric is a share, such as an accuracy, the name of the metric with its sample size.
    """

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
    Shown("ref_kl", "KL estimate on the data, per token", "{:.4f}"),
    Shown("gsm8k/exact_match", "GSM8K exact match", "{:.3f}", "gsm8k/problems"),
)


@dataclass(frozen=True)
class Results:
    """The evaluation results before and after training.

    Attributes:
        before, after: Metrics before and after training, keyed by name without the prefix of the dataset; `None` if
            there was no such evaluation.
        accuracies: Accuracies, keyed by "before" and "after". Their intervals treat different prompts as independent.
        baselines: Accuracies of rules that need no training, keyed by name.
        disagreements: For each rule, the trained model's accuracy on the examples where it disagrees with the rule;
            `None` if they never disagree.
        examples: Number of evaluated examples; `None` if it is unknown.
        last: Name of the last evaluation: "after" if it was made at the end of training, otherwise "step" and its step.
    """

    before: Mapping[str, float] | None = None
    after: Mapping[str, float] | None = None
    accuracies: Mapping[str, Accuracy] = field(default_factory=dict)
    baselines: Mapping[str, Accuracy] = field(default_factory=dict)
    disagreements: Mapping[str, Accuracy | None] = field(default_factory=dict)
    examples: int | None = None
    last: str = "after"

    def verdicts(self) -> list[str]:
        """Compare the trained model with each rule, in one sentence per rule.

        Two accuracies on the same examples are not independent. Therefore, only the examples on which the model and the
        rule disagree are counted. The model is better if the whole confidence interval of its accuracy on these
        examples is above one half.
        """
        return [_verdict(rule, accuracy) for rule, accuracy in self.disagreements.items()]

    @property
    def columns(self) -> list[tuple[str, Mapping[str, float]]]:
        """The columns of the table: a pair (name, metrics) for each evaluation that was made."""
        both = (("before", self.before), (self.last, self.after))
        return [(name, metrics) for name, metrics in both if metrics is not None]

    def rows(self) -> list[tuple[str, list[str]]]:
        """Return the rows of the table: for each row, its label and one cell for each of `columns`."""
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
        """The name of the metric in `accuracies`: the accuracy of rewards or, if the loss has none, of log-ratios."""
        names = ("rewards/accuracies", "log_ratios/accuracies")
        return next((name for name in names if name in (self.after or {})), "")

    def _says_the_same(self, shown: Shown) -> bool:
        """Return True for the row of the log-ratio accuracy if it equals the reward accuracy, as with DPO."""
        pair = ("log_ratios/accuracies", "rewards/accuracies")
        values = [[metrics.get(key) for _, metrics in self.columns] for key in pair]
        return shown.key == pair[0] and values[0] == values[1]

    def _cell(self, shown: Shown, column: str, metrics: Mapping[str, float]) -> str:
        if shown.key not in metrics:
            return "–"
        value = float(metrics[shown.key]) + 0.0  # converts −0.0 to 0.0
        known = "before" if column == "before" else "after"
        if shown.key == self._measured and known in self.accuracies:
            return str(self.accuracies[known])
        size = metrics.get(shown.share_of or "")
        if shown.share_of is None or not size:
            return shown.form.format(value)
        low, high = wilson_interval(value, size)
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def results_of(record: RunRecord, name: str = "eval") -> Results:
    """Return the results for one dataset.

    Args:
        name: Prefix of the dataset's metrics.
    """
    before, after = first_evaluation(record.logs, name), last_evaluation(record.logs, name)
    known = [entry for entry in record.accuracies if entry["set"] == name]
    examples = [entry for entry in record.examples if entry["set"] == name]
    step, steps = _last_step(record.logs, name), record.run.get("steps")
    if step == 0 and steps:  # The only evaluation was made before training.
        return Results(before=_unprefixed(before, name), examples=len(examples) or None)
    accuracies = {}
    if known:
        first, last = known[0], known[-1]
        accuracies = {"after": _accuracy(last)} | ({"before": _accuracy(first)} if first["step"] == 0 else {})
    return Results(
        _unprefixed(before, name),
        _unprefixed(after, name),
        accuracies,
        baselines(examples),
        disagreements(examples),
        len(examples) or None,
        "after" if steps is None or step is None or step >= steps else f"step {step:g}",
    )


def _unprefixed(metrics: Mapping[str, float] | None, name: str) -> dict[str, float] | None:
    return {key.removeprefix(f"{name}_"): value for key, value in metrics.items()} if metrics else None


def evaluated_sets(record: RunRecord) -> list[str]:
    """Return the metric prefixes of the evaluated datasets."""
    return list(record.run.get("sets") or ["eval"])


def baselines(examples: list[dict[str, Any]]) -> dict[str, Accuracy]:
    """Compute the accuracy of each rule that needs no training, keyed by the rule's name (see `_rules`)."""
    prompts = [entry["prompt"] for entry in examples]
    found = {rule: accuracy_of(values, prompts) for rule, values in _rules(examples).items()}
    return {rule: accuracy for rule, accuracy in found.items() if accuracy is not None}


def disagreements(examples: list[dict[str, Any]]) -> dict[str, Accuracy | None]:
    """Compute the model's accuracy on the examples where it disagrees with a rule, for each rule of `_rules`.

    A right prediction is better than a tie, and a tie is better than a wrong prediction. The model counts as right on
    an example if its prediction is better than that of the rule.
    """
    prompts = [entry["prompt"] for entry in examples]
    model = correct(np.array([entry["margin"] for entry in examples], dtype=float))
    found = {}
    for rule, values in _rules(examples).items():
        difference = model - values
        if not np.isnan(difference).all():
            found[rule] = accuracy_of(np.where(difference == 0, np.nan, correct(difference)), prompts)
    return found


def _rules(examples: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Return for each rule that needs no training whether it is right, keyed by the rule's name.

    There are two rules: the longer response is better, and the response with the higher reference log-prob is better.
    For each example, the value is 1 if the rule is right, ½ for a tie, and 0 if the rule is wrong.
    """
    if not examples:
        return {}
    lengths = np.array([entry["lengths"] for entry in examples], dtype=float)
    reference = np.array([entry["reference_margin"] for entry in examples], dtype=float)
    return {LONGER: correct(lengths[:, 0] - lengths[:, 1]), UNTRAINED: correct(reference)}


def _verdict(rule: str, accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return f"Not better than “{rule}”: they agree on every example."
    found = "Better" if accuracy.low > 0.5 else "Worse" if accuracy.high < 0.5 else "Not clearly better"
    examples = "1 example" if accuracy.examples == 1 else f"{accuracy.examples:,} examples"
    return f"{found} than “{rule}”: the model is right in {accuracy} of the {examples} where they disagree."


def _accuracy(entry: dict[str, Any]) -> Accuracy:
    return Accuracy(**{name: entry[name] for name in ("value", "low", "high", "examples", "prompts")})


def first_evaluation(log_history: Iterable[Mapping[str, float]], name: str = "eval") -> dict[str, float] | None:
    """Return the metrics of the evaluation at step 0, including those that callbacks add; `None` if there are none.

    Args:
        name: Prefix of the metrics. Each evaluation dataset has its own prefix.
    """
    return _evaluation_at(0, log_history, name) or None


def last_evaluation(log_history: Iterable[Mapping[str, float]], name: str = "eval") -> dict[str, float]:
    """Return the metrics of the last evaluation, including those that callbacks add; empty if there are none."""
    records = list(log_history)
    step = _last_step(records, name)
    return {} if step is None else _evaluation_at(step, records, name)


def _last_step(logs: Iterable[Mapping[str, float]], name: str) -> float | None:
    """Return the step of the last evaluation; `None` if there is none."""
    return max((log["step"] for log in logs if any(key.startswith(f"{name}_") for key in log)), default=None)


def _evaluation_at(step: float, log_history: Iterable[Mapping[str, float]], name: str) -> dict[str, float]:
    """Return all evaluation metrics of a step. Later logs of this step override earlier ones."""
    found: dict[str, float] = {}
    for record in log_history:
        if record["step"] == step:
            found |= {key: value for key, value in record.items() if key.startswith(f"{name}_")}
    return {key: value for key, value in found.items() if not key.endswith(_BOOKKEEPING)}
