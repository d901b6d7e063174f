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
    """One of the figure's axes: the curves it shows (metric key → color, label) and the value of no preference."""

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
    """Draws the curves of a run into a PNG and returns its path.

    Lines are the training batches as logged; diamonds are evaluations on the held-back pairs (the first one stands at
    step 0 where the run evaluated on start). The dotted line is what a policy without a preference would show.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = list(log_history)
    # A Metric of its own, not pyplot's: no window system is asked for and no global state is left behind.
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        _draw_panel(axes, panel, records)
    figure.suptitle(title, fontsize=13)
    figure.supxlabel("lines: training batches   ◆ evaluation on the held-back pairs", fontsize=9, color="#555555")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _draw_panel(axes, panel: Panel, records: list[Mapping[str, float]]) -> None:
    """One panel: every curve that the run has, with its evaluation points."""
    curves = {key: look for key, look in panel.curves.items() if _has(records, key)}
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
    """The numbers of the first and the last evaluation; of two curves, the higher's above and the lower's below."""
    series = [list(zip(*_series(records, f"eval_{key}"), strict=True)) for key in curves]
    for ends in zip(*(dict.fromkeys(points[:1] + points[-1:]) for points in series), strict=False):
        for rank, (step, value) in enumerate(sorted(ends, key=lambda point: -point[1])):
            offset = (0, 9 if rank == 0 else -16)
            axes.annotate(
                f"{value + 0.0:.3f}", (step, value), offset, textcoords="offset points", fontsize=8, ha="center"
            )


def _has(records: list[Mapping[str, float]], key: str) -> bool:
    """Whether the run has logged or evaluated the metric."""
    return any(key in record or f"eval_{key}" in record for record in records)


def _series(records: list[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """The steps and the values of the records that have the metric."""
    points = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in points], [value for _, value in points]
