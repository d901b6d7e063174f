"""The curves of a run, panel by panel, as numbers: the PNG and the page draw the same. A panel without curves is none.

Colors are those of M. Okabe and K. Ito, which people with any color vision can tell apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_prefopt.reporting.record import RunRecord
from hf_prefopt.reporting.results import LONGER, evaluated_sets, results_of

# Blue, vermilion, bluish green, orange, reddish purple, sky blue.
OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9")
# Logs that a running mean takes, at least, and as a share of all.
_FEWEST, _SHARE = 5, 0.1

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """A panel: its curves (metric → color number, label), and (value, label) of what they are compared with."""

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
    """A metric of a run.

    Attributes:
        label, color: what it is called, and the number of its color.
        train, mean: the training logs, and their running mean; (step, value).
        evaluations: (step, value). intervals: (low, high) by step, where it is known.
    """

    label: str
    color: int
    train: Points
    mean: Points
    evaluations: Points
    intervals: Mapping[float, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """A panel that has curves.

    Attributes:
        lines: (value, label) of what the curves are compared with.
    """

    panel: Panel
    curves: Sequence[Curve]
    lines: Sequence[tuple[float, str]] = ()

    @property
    def values(self) -> list[float]:
        """All values that must be visible."""
        points = [y for c in self.curves for _, y in (*c.train, *c.evaluations)]
        ends = [y for c in self.curves for interval in c.intervals.values() for y in interval]
        return points + ends + [value for value, _ in self.lines if self._is_near(value, points)]

    def _is_near(self, value: float, points: list[float]) -> bool:
        """Whether a line can be shown without making the curves one mark: within twice their range."""
        low, high = min(points), max(points)
        return low - 2 * (high - low) <= value <= high + 2 * (high - low)


def drawn_panels(record: RunRecord) -> list[Drawn]:
    """The panels of a run that have curves, of its first evaluation set."""
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
    """(step, value) of the logs that have the metric; of several at one step the last."""
    return list({log["step"]: log[key] for log in logs if log.get(key) is not None}.items())


def running_mean(points: Points) -> Points:
    """At each log the mean of the last few: a tenth of all, at least five; nothing for fewer than that."""
    if len(points) < _FEWEST:
        return []
    width = max(_FEWEST, round(_SHARE * len(points)))
    values = [value for _, value in points]
    return [
        (step, sum(values[max(0, at + 1 - width) : at + 1]) / min(at + 1, width)) for at, (step, _) in enumerate(points)
    ]


def median_of(logs: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The median of a metric over the logs; `None` if none has it."""
    values = [log[key] for log in logs if log.get(key) is not None]
    return float(np.median(values)) if values else None


def three_digits(value: float) -> str:
    """A number with three significant digits: 0.693, −30.6, 0.00012."""
    text = f"{value + 0.0:.3g}"
    return text.replace("-", "−")
