"""Rebuild the report of a run from the record in its folder: an HTML page and the training curves.

hf_prefopt report runs/dpo_lora
"""

from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from pathlib import Path

from hf_prefopt.reporting.closing import closing_report
from hf_prefopt.reporting.plots import plot_training
from hf_prefopt.reporting.record import read_record
from hf_prefopt.reporting.report_page import write_report
from hf_prefopt.reporting.results import evaluated_sets, results_of


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `report`."""
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of the run, or its record.jsonl")
    parser.add_argument("--html", metavar="FILE", type=Path, help="where to write the page (default: RUN/report.html)")


def run(options: Namespace) -> int:
    """Write the page and the curves, and print the results. Raises `ValueError` if the run has no record."""
    record = read_record(options.run)
    folder = options.run if options.run.is_dir() else options.run.parent
    page = options.html or folder / "report.html"
    results = {}
    try:
        results["report"] = write_report(record, page)
        if find_spec("matplotlib"):
            results["training curves"] = plot_training(record, page.with_name("curves.png"))
    except OSError as error:
        raise ValueError(f"{page} cannot be written: {error.strerror}") from error
    closing_report(results_of(record, evaluated_sets(record)[0]), results, {}, answers=record.answers)
    return 0
