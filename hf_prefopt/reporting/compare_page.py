"""Compare several runs in a table, and in one chart per metric with the curves of all runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hf_prefopt.reporting.pages import render_page, write_page
from hf_prefopt.reporting.panels import PANELS, Points, median_of, running_mean, series
from hf_prefopt.reporting.preview import visible
from hf_prefopt.reporting.record import RunRecord
from hf_prefopt.reporting.results import LONGER, SHOWN, evaluated_sets, results_of
from hf_prefopt.reporting.svg import overlay_chart


def run_names(records: Sequence[RunRecord], folders: Sequence[str]) -> list[str]:
    """Return the names of the runs. If two names are equal, return the folders of all runs instead."""
    names = [record.name for record in records]
    return names if len(set(names)) == len(names) else list(map(str, folders))


def comparison_rows(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the rows of the table, each with a label and one cell per run. Rows without any value are omitted."""
    results = [results_of(record, evaluated_sets(record)[0]) for record in records]
    cells = [{label: values[-1] for label, values in found.rows()} for found in results]
    labels = [shown.label for shown in SHOWN]
    rows = [("loss function", [_losses(record) for record in records])]
    rows += [(label, [own.get(label, "–") for own in cells]) for label in labels if any(label in own for own in cells)]
    rows.append((f"accuracy of “{LONGER}”", [str(found.baselines.get(LONGER, "–")) for found in results]))
    rows.append(("held-out examples", [f"{found.examples:,}" if found.examples else "–" for found in results]))
    rows.append(("optimizer steps", [str(record.run.get("steps", "–")) for record in records]))
    rows.append(("minutes", [_minutes(record) for record in records]))
    for key, label, form in (
        ("tokens_per_second", "tokens per second", "{:,.0f}"),
        ("peak_memory_gib", "peak memory, GiB", "{:.2f}"),
    ):
        rows.append((label, [_median(record, key, form) for record in records]))
    rows.append(("warnings", [str(len(record.run.get("warnings") or ())) for record in records]))
    return [(label, values) for label, values in rows if set(values) != {"–"}]


def comparison_notes(records: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    """Return notes about differences that make a comparison unfair: other held-out examples, or another base model."""
    notes = []
    groups: dict[Any, list[str]] = {}
    for record, name in zip(records, names, strict=True):
        known = tuple((entry["row"], entry["pair"], tuple(entry["lengths"])) for entry in record.examples)
        groups.setdefault(known, []).append(name)
    if len(groups) > 1:
        listed = "; ".join(", ".join(group) for group in groups.values())
        notes.append(f"The runs were evaluated on different examples; their accuracies are not comparable: {listed}.")
    models = sorted({str(record.run.get("base_model")) for record in records})
    if len(models) > 1:
        notes.append(f"The runs started from different models: {', '.join(models)}.")
    return notes


def comparison_table(records: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """Build the table of the runs for the terminal."""
    table = Table("", *(escape(visible(name)) for name in names), title="After training", title_justify="left")
    for label, cells in comparison_rows(records):
        table.add_row(label, *(escape(visible(cell)) for cell in cells))
    return table


def comparison_page(records: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Return an HTML page with the table, the notes and the charts."""
    charts: list[tuple[Any, str, Any]] = []
    for panel in PANELS:
        several = len({label for _, label in panel.curves.values()}) > 1
        for key, (_, label) in panel.curves.items():
            named = [(name, _curve(record, key)) for name, record in zip(names, records, strict=True)]
            if any(points for _, points in named):
                charts.append((panel, label if several else "", overlay_chart(f"{panel.title}, {label}", named)))
    return render_page(
        "compare.html",
        names=names,
        rows=comparison_rows(records),
        notes=comparison_notes(records, names),
        charts=charts,
    )


def write_comparison(records: Sequence[RunRecord], names: Sequence[str], path: Path) -> Path:
    """Write the page to a file, and return the path."""
    return write_page(comparison_page(records, names), path)


def _curve(record: RunRecord, key: str) -> Points:
    points = series(record.logs, key)
    return running_mean(points) or points


def _losses(record: RunRecord) -> str:
    return " + ".join(loss["name"] for loss in record.run.get("losses", [])) or "–"


def _minutes(record: RunRecord) -> str:
    seconds = record.run.get("seconds")
    return f"{seconds / 60:.1f}" if seconds else "–"


def _median(record: RunRecord, key: str, form: str) -> str:
    value = median_of(record.logs, key)
    return form.format(value) if value is not None else "–"
