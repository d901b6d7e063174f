"""The training curves as a PNG: loss, reward accuracy, reward margin, chosen and rejected rewards.

Reads `trainer.state.log_history` alone, so a figure can be drawn again from a checkpoint's `trainer_state.json`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TRAIN_COLOR = "#4c72b0"
REJECTED_COLOR = "#c44e52"
CHANCE_COLOR = "#999999"


@dataclass(frozen=True)
class Panel:
    """One panel of the figure: its curves (metric key → color, label) and the value without a preference."""

    title: str
    unit: str
    curves: Mapping[str, tuple[str, str]]
    no_preference: float | None = None


PANELS = (
    Panel("Loss", "nats", {"loss": (TRAIN_COLOR, "loss")}),
    Panel("Reward accuracy", "share of pairs", {"rewards/accuracies": (TRAIN_COLOR, "accuracy")}, 0.5),
    Panel("Reward margin", "nats", {"rewards/margins": (TRAIN_COLOR, "chosen − rejected")}, 0.0),
    Panel(
        "Rewards",
        "nats",
        {
            "rewards/chosen": (TRAIN_COLOR, "chosen"),
            "rewards/rejected": (REJECTED_COLOR, "rejected"),
            "rewards/best": (TRAIN_COLOR, "best of the list"),
        },
        0.0,
    ),
)


def plot_training(log_history: Iterable[Mapping[str, float]], path: str | Path, title: str = "Training") -> Path:
    """Draw the curves of a run as a PNG, and return its path.

    Lines are training batches; diamonds are evaluations. A policy without a preference is at the dotted line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = list(log_history)
    # Not pyplot, which needs a window system and has global state.
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _draw_panel(axes, panel, records)
    figure.suptitle(title, fontsize=13)
    figure.supxlabel("lines: training batches   ◆ evaluation on held-out examples", fontsize=9, color="#555555")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _draw_panel(axes, panel: Panel, records: list[Mapping[str, float]]) -> None:
    """Draw every curve of the panel that the run has, with its evaluations."""
    logged = set().union(*records)
    curves = {key: look for key, look in panel.curves.items() if {key, f"eval_{key}"} & logged}
    for key, (color, label) in curves.items():
        axes.plot(*_series(records, key), color=color, linewidth=1.6, marker=".", markersize=4, label=label)
        evaluations = _series(records, f"eval_{key}")
        axes.plot(*evaluations, color=color, linestyle="none", marker="D", markersize=8, markeredgecolor="black")
    _label_evaluations(axes, curves, records)
    if panel.no_preference is not None:
        axes.axhline(panel.no_preference, color=CHANCE_COLOR, linestyle=":", linewidth=1.2, zorder=0)
    axes.set(title=panel.title, xlabel="optimizer step", ylabel=f"{panel.title.lower()} [{panel.unit}]")
    axes.margins(x=0.08, y=0.2)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, loc="best")


def _label_evaluations(axes, curves: Iterable[str], records: list[Mapping[str, float]]) -> None:
    """Print the values of the first and last evaluations: above the higher curve, and below the lower one."""
    series = [list(zip(*_series(records, f"eval_{key}"), strict=True)) for key in curves]
    for ends in zip(*(dict.fromkeys(points[:1] + points[-1:]) for points in series), strict=False):
        for rank, (step, value) in enumerate(sorted(ends, key=lambda point: -point[1])):
            offset = (0, 9 if rank == 0 else -16)
            text = f"{value + 0.0:.3f}"
            axes.annotate(text, (step, value), offset, textcoords="offset points", fontsize=8, ha="center")


def _series(records: list[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """The steps and the values of the records that have the metric."""
    points = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in points], [value for _, value in points]
