"""The curves of a run, grouped into panels. The PNG and the HTML page draw the same panels and leave out empty ones.

The colors are from the palette of M. Okabe and K. Ito, which also works with color vision deficiency.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_prefopt.reporting.record import RunRecord
from hf_prefopt.reporting.results import LONGER, evaluated_sets, results_of

# Blue, vermilion, bluish green, orange, reddish purple, sky blue.
OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9")
# Size of the window of the running mean: the minimum number of logs, and the share of all logs.
_FEWEST, _SHARE = 5, 0.1

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """A panel of metrics.

    Attributes:
        title, unit: Title of the panel, and unit of its values.
        curves: Color index and label of each curve, keyed by metric.
        compared_with: Value and label of a baseline; `None` if there is none.
    """

    title: str
    unit: str
    curves: Mapping[str, tuple[int, str]]
    compared_with: tuple[float, str] | None = None


PANELS = (
    Panel("Loss", "nats", {"loss": (0, "loss")}),
    Panel("Reward accuracy", "share of pairs", {"rewards/accuracies": (0, "accuracy")}, (0.5, "no preference")),
    Panel("Reward margin", "nats", {"rewards/margins": (0, "chosen − rejected")}, (0.0, "no preference")),
    Panel(
        "Rewards",
        "nats",
        {
            "rewards/chosen": (0, "chosen"),
            "rewards/rejected": (1, "rejected"),
            "rewards/best": (0, "best of the list"),
            "rewards/responses": (0, "responses"),
        },
    ),
    Panel(
        "Δ log p",
        "nats per token",
        {
            "log_ratios/chosen": (0, "chosen"),
            "log_ratios/rejected": (1, "rejected"),
            "log_ratios/responses": (0, "responses"),
        },
        (0.0, "unchanged"),
    ),
    Panel("KL to the reference", "nats per token", {"ref_kl": (0, "estimate on the data")}),
)


@dataclass(frozen=True)
class Curve:
    """The curve of a metric.

    Attributes:
        label: Label of the curve.
        color: Index of its color in `OKABE_ITO`.
        train, mean: Values in the training logs, and their running mean, as pairs (step, value).
        evaluations: Values in the evaluations, as pairs (step, value).
        intervals: Confidence intervals (low, high) of evaluations, keyed by step.
    """

    label: str
    color: int
    train: Points
    mean: Points
    evaluations: Points
    intervals: Mapping[float, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """A panel with its curves.

    Attributes:
        panel: The panel.
        curves: Its curves.
        lines: Its baselines, as pairs (value, label).
    """

    panel: Panel
    curves: Sequence[Curve]
    lines: Sequence[tuple[float, str]] = ()

    @property
    def values(self) -> list[float]:
        """All values that must be visible: those of curves, of intervals, and of baselines close to the curves."""
        points = [y for c in self.curves for _, y in (*c.train, *c.evaluations)]
        ends = [y for c in self.curves for interval in c.intervals.values() for y in interval]
        return points + ends + [value for value, _ in self.lines if self._is_near(value, points)]

    def _is_near(self, value: float, points: list[float]) -> bool:
        """Return True if the distance of a baseline from the curves is at most twice the range of the curves.

        If a more distant baseline were visible, the curves would look flat.
        """
        low, high = min(points), max(points)
        return low - 2 * (high - low) <= value <= high + 2 * (high - low)


def drawn_panels(record: RunRecord) -> list[Drawn]:
    """Return the panels of a run that have curves, with the evaluations of the first evaluation dataset."""
    name = evaluated_sets(record)[0]
    known = [entry for entry in record.accuracies if entry["set"] == name]
    intervals = {entry["step"]: (entry["low"], entry["high"]) for entry in known}
    longer = results_of(record, name).baselines.get(LONGER)
    drawn = []
    for panel in PANELS:
        curves = [
            _curve(record.logs, name, key, color, label, intervals if key == "rewards/accuracies" else {})
            for key, (color, label) in panel.curves.items()
        ]
        curves = [curve for curve in curves if curve.train or curve.evaluations]
        lines = [panel.compared_with] if panel.compared_with is not None else []
        if longer is not None and "rewards/accuracies" in panel.curves:
            lines.append((longer.value, LONGER))
        if curves:
            drawn.append(Drawn(panel, curves, lines))
    return drawn


def _curve(
    logs: Sequence[Mapping[str, Any]], name: str, key: str, color: int, label: str, intervals: Mapping[float, Any]
) -> Curve:
    train, evaluations = series(logs, key), series(logs, f"{name}_{key}")
    return Curve(label, color, train, running_mean(train), evaluations, intervals)


def series(logs: Sequence[Mapping[str, Any]], key: str) -> Points:
    """Return a pair (step, value) for each step with a log that has the metric. The last such log is used."""
    return list({log["step"]: log[key] for log in logs if log.get(key) is not None}.items())


def running_mean(points: Points) -> Points:
    """Compute a running mean over a tenth of the logs, but at least five logs. Return [] for fewer than five logs."""
    if len(points) < _FEWEST:
        return []
    width = max(_FEWEST, round(_SHARE * len(points)))
    values = [value for _, value in points]
    return [
        (step, sum(values[max(0, at + 1 - width) : at + 1]) / min(at + 1, width)) for at, (step, _) in enumerate(points)
    ]


def median_of(logs: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Compute the median of a metric over the logs. Return `None` if no log has the metric."""
    values = [log[key] for log in logs if log.get(key) is not None]
    return float(np.median(values)) if values else None


def three_digits(value: float) -> str:
    """Format a number with three significant digits: 0.693, −30.6, 0.00012."""
    text = f"{value + 0.0:.3g}"
    return text.replace("-", "−")
