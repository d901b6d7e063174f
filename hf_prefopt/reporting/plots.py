"""Plot the training curves as a PNG. The metrics are those of `panels`."""

from pathlib import Path
from typing import Any

from hf_prefopt.reporting.panels import OKABE_ITO, Curve, Drawn, drawn_panels, three_digits
from hf_prefopt.reporting.record import RunRecord

_QUIET = "#777777"
_MARKS = ("D", "s", "o", "^", "v", "P")


def plot_training(record: RunRecord, path: str | Path) -> Path:
    """Plot the curves of a run, and return the path of the PNG.

    Faint lines show training logs, and solid or dashed lines show their running mean. Markers show evaluations. For
    accuracies, vertical lines show the 95 % interval. Dotted lines show baselines.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = drawn_panels(record)
    rows = max(1, -(-len(panels) // 2))
    # pyplot is not used, because it has global state and may select a GUI backend.
    figure = Figure(figsize=(10, 0.9 + 2.9 * rows), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, 2, squeeze=False).flat
    for axes, drawn in zip(places, panels, strict=False):
        _draw(axes, drawn)
    for axes in list(figure.axes)[len(panels) :]:
        axes.remove()
    losses = " + ".join(loss["name"] for loss in record.run.get("losses", []))
    figure.suptitle(f"{record.name}: {losses}" if losses else record.name, fontsize=13)
    text = "faint: training batches   line: their running mean   marks: held-out examples, with 95% interval"
    figure.supxlabel(f"optimizer step\n{text}", fontsize=9, color="#555555")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw(axes: Any, drawn: Drawn) -> None:
    """Plot the curves of a panel together with their baselines."""
    low, high = min(drawn.values), max(drawn.values)
    room = 0.12 * (high - low) or abs(high) or 1.0
    axes.set_ylim(low - room, high + 1.6 * room)
    for value, label in drawn.lines:
        axes.axhline(value, color=_QUIET, linestyle=":", linewidth=1.1, zorder=0)
        if low - room <= value <= high + room:
            place = {"xy": (1, value), "xycoords": ("axes fraction", "data"), "xytext": (-2, 2)}
            axes.annotate(label, **place, textcoords="offset points", fontsize=7, color=_QUIET, ha="right")
    for curve in drawn.curves:
        _draw_curve(axes, curve)
    axes.set_title(f"{drawn.panel.title} [{drawn.panel.unit}]", fontsize=10, loc="left")
    axes.margins(x=0.04)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    if len(drawn.curves) > 1:
        axes.legend(frameon=False, loc="best", fontsize=8)


def _draw_curve(axes: Any, curve: Curve) -> None:
    from matplotlib.patheffects import withStroke

    color, mark = OKABE_ITO[curve.color], _MARKS[curve.color]
    style = "-" if curve.color == 0 else "--"
    if curve.train:
        faint = {"alpha": 0.3, "linewidth": 0.9} if curve.mean else {"linewidth": 1.4}
        axes.plot(*zip(*curve.train, strict=True), color=color, marker=".", markersize=3, **faint)
    if curve.mean:
        axes.plot(*zip(*curve.mean, strict=True), color=color, linewidth=1.9, linestyle=style, label=curve.label)
    for step, (low, high) in curve.intervals.items():
        axes.plot([step, step], [low, high], color=color, linewidth=1.3, zorder=2)
    if curve.evaluations:
        looks = {"color": color, "marker": mark, "markersize": 6, "markeredgecolor": "white", "linestyle": "none"}
        label = None if curve.mean else curve.label
        axes.plot(*zip(*curve.evaluations, strict=True), **looks, zorder=3, label=label)
    for step, value in {curve.evaluations[0], curve.evaluations[-1]} if curve.evaluations else ():
        above = curve.color == 0
        axes.annotate(
            three_digits(value),
            (step, value),
            (0, 7 if above else -12),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            color=color,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=4,
        )
