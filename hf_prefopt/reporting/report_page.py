"""Build the report of a run from its record, as one HTML page without scripts and without external resources."""

from pathlib import Path
from typing import Any

import numpy as np

from hf_prefopt.reporting.notation import NOTATION
from hf_prefopt.reporting.pages import render_page, write_page
from hf_prefopt.reporting.panels import drawn_panels, median_of, three_digits
from hf_prefopt.reporting.record import RunRecord
from hf_prefopt.reporting.results import LONGER, Results, evaluated_sets, results_of
from hf_prefopt.reporting.svg import line_chart, scatter_chart
from hf_prefopt.reporting.table import plain_caption

# Highest color level of a token. Level 0 has no color.
_LEVELS = 10
# Maximum number of points in a scatter chart.
_DOTS = 2000


def report_page(record: RunRecord) -> str:
    """Return the report as an HTML page."""
    scale = color_scale(record)

    def shade(value: float) -> int:
        """Return the color level of a token with this log-ratio, from 0 to 10."""
        return min(_LEVELS, round(_LEVELS * abs(value) / scale))

    tables = [(name, results_of(record, name)) for name in evaluated_sets(record)]
    return render_page(
        "report.html",
        record=record,
        figures=_figures(record, tables[0][1]),
        tables=[(name, results) for name, results in tables if results.after is not None],
        caption=plain_caption,
        charts=[(drawn, line_chart(drawn)) for drawn in drawn_panels(record)],
        by_length=_by_length(record),
        right=[pair for pair in record.pairs if pair["is_right"]],
        wrong=[pair for pair in record.pairs if not pair["is_right"]],
        shade=shade,
        scale=scale,
        facts=_facts(record),
        details=_details(record),
    )


def write_report(record: RunRecord, path: str | Path) -> Path:
    """Write the page to a file, and return the path."""
    return write_page(report_page(record), Path(path))


def color_scale(record: RunRecord) -> float:
    """Return the absolute log-ratio, in nats, from which tokens have the highest color level.

    It is the 95th percentile of the absolute log-ratios of all tokens in the record.
    """
    values = [abs(token[1]) for pair in record.pairs for response in pair["responses"] for token in response["tokens"]]
    return max(float(np.quantile(values, 0.95)), 1e-6) if values else 1.0


def _figures(record: RunRecord, results: Results) -> list[tuple[str, str]]:
    """Return the numbers at the top of the page, as pairs (value, label)."""
    figures = []
    if accuracy := results.accuracies.get("after"):
        when = "" if results.last == "after" else f" at {results.last}"
        figures.append((f"{accuracy.value:.1%}", f"held-out accuracy{when}"))
        figures.append((f"{accuracy.low:.1%} – {accuracy.high:.1%}", "its 95% interval"))
    if longer := results.baselines.get(LONGER):
        figures.append((f"{longer.value:.1%}", f"accuracy of “{LONGER}”"))
    for key, form, what in (
        ("positions_saved", "{:.0%}", "positions saved by the layout"),
        ("tokens_per_second", "{:,.0f}", "tokens per second"),
        ("peak_memory_gib", "{:.2f} GiB", "peak memory"),
        ("mfu", "{:.0%}", "of the GPU's peak"),
    ):
        if (value := median_of(record.logs, key)) is not None:
            figures.append((form.format(value), what))
    if record.run.get("seconds"):
        figures.append((f"{record.run['seconds'] / 60:.1f} min", "training time"))
    return figures


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """Return the facts about the model, the data and the training setup, as pairs (name, text)."""
    run, summary = record.run, record.run.get("summary", {})
    losses = run.get("losses", [])
    found = {
        "Base model": run.get("base_model"),
        "Trained": summary.get("model"),
        "Loss": "; ".join(_loss(loss, len(losses)) for loss in losses),
        "Notation": NOTATION if losses else None,
        "Reference": run.get("reference"),
        "Layout": summary.get("layout"),
        "Attention": summary.get("attention"),
        "Data": summary.get("data"),
        "Datasets": str(run.get("data", {}).get("datasets") or "").replace("`", ""),  # backticks are for Markdown
        "Batch": summary.get("batch"),
        "Optimizer": summary.get("optimizer"),
        "Hardware": run.get("hardware"),
        "Command": run.get("command"),
    }
    return [(name, str(value)) for name, value in found.items() if value]


def _loss(loss: dict[str, Any], losses: int) -> str:
    """Format a loss as one line."""
    weight = f"{loss['weight']:g} × " if losses > 1 else ""
    settings = ", ".join(f"{name} = {value}" for name, value in loss["hyperparameters"].items())
    paper = f"arXiv:{loss['paper']}" if loss["paper"] else ""
    return weight + "; ".join(part for part in (f"{loss['name']}: {loss['formula']}", settings, paper) if part)


def _details(record: RunRecord) -> list[tuple[str, Any]]:
    both = {**record.run.get("hyperparameters", {}), **record.run.get("versions", {})}
    return [(name, value) for name, value in both.items() if value is not None]


def _by_length(record: RunRecord) -> Any:
    """Build a scatter chart of margins over length differences. Return `None` if no example has both."""
    name = evaluated_sets(record)[0]
    points = []
    for entry in record.examples:
        lengths, margin = entry["lengths"], entry["margin"]
        if entry["set"] == name and margin is not None and None not in lengths:
            difference = lengths[0] - lengths[1]
            text = f"row {entry['row']}: margin {three_digits(margin)}, chosen {difference:+g} tokens"
            points.append((float(difference), float(margin), text))
    step = -(-len(points) // _DOTS) if points else 1
    return scatter_chart("Margins by length", "chosen − rejected, tokens", points[::step]) if points else None
