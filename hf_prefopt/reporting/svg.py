"""Draw charts as inline SVG without scripts. The `title` of a point has its values; browsers show it on hover.

Colors are CSS classes (`c0`, `c1`, …), so a page can define them for light and dark mode.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from markupsafe import Markup, escape

from hf_prefopt.reporting.panels import Curve, Drawn, Points, three_digits

_WIDTH, _HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 30


class Axes:
    """The axes of a chart, which map values to positions in SVG units."""

    def __init__(self, xs: Iterable[float], ys: Iterable[float]):
        self.x_low, self.x_high = _bounds(xs)
        low, high = _bounds(ys)
        room = 0.08 * (high - low)
        self.y_low, self.y_high = low - room, high + room

    def x(self, value: float) -> float:
        """Return the distance of an x value from the left edge of the chart."""
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        """Return the distance of a y value from the top edge of the chart."""
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    def path(self, points: Points) -> str:
        """Return the SVG path through the points."""
        return "M" + "L".join(f"{self.x(x)},{self.y(y)}" for x, y in points)


def _bounds(values: Iterable[float]) -> tuple[float, float]:
    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    return (low, high) if high > low else (low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1)


def line_chart(drawn: Drawn) -> Markup:
    """Draw a panel of curves over optimizer steps."""
    steps = [x for curve in drawn.curves for x, _ in (*curve.train, *curve.evaluations)]
    axes = Axes(steps, drawn.values)
    parts = [_frame(axes, "optimizer step", whole=True)]
    compared = [(value, label) for value, label in drawn.lines if axes.y_low <= value <= axes.y_high]
    parts += [_horizontal(axes, value) for value, _ in compared]
    parts += [_curve(axes, curve) for curve in drawn.curves]
    # The name of the lowest of several lines is written below it, because the lines may be close together.
    lowest = min((value for value, _ in compared), default=0.0) if len(compared) > 1 else None
    parts += [_label(axes, value, label, below=value == lowest) for value, label in compared]
    parts += _bands(axes, drawn.curves)
    return _svg(f"{drawn.panel.title}, {drawn.panel.unit}", parts)


def overlay_chart(title: str, named: Sequence[tuple[str, Points]]) -> Markup:
    """Draw one metric of several runs, with one curve per run."""
    axes = Axes([x for _, points in named for x, _ in points], [y for _, points in named for _, y in points])
    parts = [_frame(axes, "optimizer step", whole=True)]
    for number, (name, points) in enumerate(named):
        dash = " dashed" if number % 2 else ""
        parts.append(Markup('<path class="line c{}{}" d="{}"/>').format(number % 6, dash, axes.path(points)))
        for x, y in points:
            tip = f"{name}, step {x:g}: {three_digits(y)}"
            parts.append(_dot(axes, x, y, f"c{number % 6}", tip, 3))
    return _svg(title, parts)


def scatter_chart(title: str, x_label: str, points: Sequence[tuple[float, float, str]]) -> Markup:
    """Draw points (x, y, hover text). Points with y < 0 have another color and shape than points with y ≥ 0."""
    axes = Axes([0.0, *(x for x, _, _ in points)], [0.0, *(y for _, y, _ in points)])
    parts = [_frame(axes, x_label), _horizontal(axes, 0.0)]
    parts.append(
        Markup('<line class="compare" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(
            axes.x(0.0), _TOP, _HEIGHT - _BOTTOM
        )
    )
    for x, y, text in points:
        if y >= 0:
            parts.append(_dot(axes, x, y, "c0 faint-dot", text, 3.5))
        else:
            at = (axes.x(x) - 3, axes.y(y) - 3)
            square = '<rect class="dot c1 faint-dot" x="{}" y="{}" width="6" height="6"><title>{}</title></rect>'
            parts.append(Markup(square).format(*at, text))
    return _svg(title, parts)


def _svg(title: str, parts: Iterable[Markup]) -> Markup:
    frame = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return frame.format(_WIDTH, _HEIGHT, title, Markup("").join(parts))


def _frame(axes: Axes, x_label: str, whole: bool = False) -> Markup:
    """Draw the grid lines with their values, and the label of the x axis.

    Args:
        whole: If True, label only whole numbers on the x axis.
    """
    parts = []
    for value in _ticks(axes.y_low, axes.y_high, 4):
        y = axes.y(value)
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, _WIDTH - _RIGHT, y, y)
        )
        parts.append(
            Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(_LEFT - 6, y + 4, three_digits(value))
        )
    for value in _ticks(axes.x_low, axes.x_high, 5):
        if not whole or value == int(value):
            text = Markup('<text class="tick middle" x="{}" y="{}">{}</text>')
            parts.append(text.format(axes.x(value), _HEIGHT - _BOTTOM + 14, three_digits(value)))
    label = Markup('<text class="tick end" x="{}" y="{}">{}</text>')
    parts.append(label.format(_WIDTH - _RIGHT, _HEIGHT - 3, x_label))
    return Markup("").join(parts)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` or fewer round values between `low` and `high`."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    return [round(step * n, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _horizontal(axes: Axes, value: float) -> Markup:
    line = Markup('<line class="compare" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    return line.format(_LEFT, _WIDTH - _RIGHT, axes.y(value), axes.y(value))


def _label(axes: Axes, value: float, label: str, below: bool) -> Markup:
    """Write the name of a horizontal line above or below it."""
    y = axes.y(value) + (12 if below else -3)
    return Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(_WIDTH - _RIGHT, y, label)


def _curve(axes: Axes, curve: Curve) -> Markup:
    color = f"c{curve.color}"
    dash = " dashed" if curve.color else ""
    parts = []
    if curve.train:
        faint = " faint" if curve.mean else ""
        parts.append(Markup('<path class="line {}{}" d="{}"/>').format(color, faint, axes.path(curve.train)))
    if curve.mean:
        parts.append(Markup('<path class="line {}{}" d="{}"/>').format(color, dash, axes.path(curve.mean)))
    for step, (low, high) in curve.intervals.items():
        whisker = Markup('<line class="whisker {}" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        parts.append(whisker.format(color, axes.x(step), axes.x(step), axes.y(low), axes.y(high)))
    for step, value in curve.evaluations:
        parts.append(_dot(axes, step, value, f"{color} evaluation", "", 4.5))
    return Markup("").join(parts)


def _dot(axes: Axes, x: float, y: float, classes: str, tip: str, radius: float) -> Markup:
    title = Markup("<title>{}</title>").format(tip) if tip else ""
    dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}">{}</circle>')
    return dot.format(classes, axes.x(x), axes.y(y), radius, title)


def _bands(axes: Axes, curves: Sequence[Curve]) -> list[Markup]:
    """Draw an invisible vertical band for each step. On hover, it shows all values of this step."""
    told: dict[float, list[str]] = {}
    for curve in curves:
        for what, points in (("", curve.train), (" (held-out)", curve.evaluations)):
            for step, value in points:
                interval = curve.intervals.get(step) if what else None
                ends = f" [{three_digits(interval[0])}, {three_digits(interval[1])}]" if interval else ""
                told.setdefault(step, []).append(f"{curve.label}{what}: {three_digits(value)}{ends}")
    steps = sorted(told)
    edges = [_LEFT, *((axes.x(a) + axes.x(b)) / 2 for a, b in pairwise(steps)), _WIDTH - _RIGHT]
    band = Markup('<rect class="band" x="{}" y="{}" width="{}" height="{}"><title>{}</title></rect>')
    return [
        band.format(
            round(left, 1),
            _TOP,
            round(max(right - left, 0.5), 1),
            _HEIGHT - _TOP - _BOTTOM,
            escape("\n".join([f"step {step:g}", *told[step]])),
        )
        for step, left, right in zip(steps, edges, edges[1:], strict=False)
    ]
