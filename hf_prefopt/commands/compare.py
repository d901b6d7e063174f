"""Compare runs: print a table, and write a page with the curves of all runs.

hf_prefopt compare runs/dpo runs/simpo runs/orpo --html comparison.html
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from hf_prefopt.reporting.compare_page import comparison_notes, comparison_table, run_names, write_comparison
from hf_prefopt.reporting.preview import visible
from hf_prefopt.reporting.record import read_record


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `compare`."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="the folder of a run, or its record.jsonl; two or more")
    parser.add_argument(
        "--html",
        metavar="FILE",
        type=Path,
        default=Path("comparison.html"),
        help="where to write the page (default: comparison.html)",
    )


def run(options: Namespace) -> int:
    """Print the table and write the page. Raises `ValueError` for fewer than two runs or a run without a record."""
    if len(options.runs) < 2:
        raise ValueError(f"compare needs two runs or more, got {options.runs[0]}: name another folder")
    records = [read_record(folder) for folder in options.runs]
    names = run_names(records, options.runs)
    console = Console()
    console.print(comparison_table(records, names))
    for note in comparison_notes(records, names):
        console.print(Text(visible(note)))
    try:
        console.print(Text(f"Page: {write_comparison(records, names, options.html)}"))
    except OSError as error:
        raise ValueError(f"--html {options.html} cannot be written: {error.strerror}") from error
    return 0
