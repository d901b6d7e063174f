"""Render the result of `inspect_dataset` as one HTML page, which loads no resources and runs no scripts.

Jinja escapes all text from the data. The page can be read without colors: scored tokens are underlined, truncated
tokens are struck through, and both have their own HTML elements.
"""

from pathlib import Path

from hf_prefopt.reporting.inspected import Inspection, events, facts
from hf_prefopt.reporting.pages import render_page, write_page

_PAGE = "inspection.html"


def inspection_page(inspection: Inspection) -> str:
    """Return the HTML page of an inspection."""
    summary = inspection.summary
    longest = max((lengths.longest for lengths in summary.lengths.values()), default=0)
    return render_page(
        _PAGE,
        found=inspection,
        facts=facts(inspection),
        events=events(inspection),
        figures=_figures(inspection),
        bars=[(name, lengths, max(longest, 1)) for name, lengths in summary.lengths.items()],
    )


def write_inspection(inspection: Inspection, path: Path) -> None:
    """Write the page to a file, and create its folder if necessary."""
    write_page(inspection_page(inspection), path)


def _figures(inspection: Inspection) -> list[tuple[str, str]]:
    """Return the numbers at the top of the page, each with its label."""
    summary = inspection.summary
    figures = [
        (f"{inspection.rows_given:,}", "rows"),
        (f"{summary.examples:,}", summary.kind),
        (f"{summary.prompts:,}", "different prompts"),
        (f"{summary.tokens:,}", "tokens"),
        (f"{summary.saved_by_row:.0%}", "saved by sharing prompts"),
    ]
    return figures + [(f"{summary.longer_accuracy:.1%}", "accuracy of “longer is better”")] * bool(summary.comparisons)
