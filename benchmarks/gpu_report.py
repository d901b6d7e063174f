"""The results of `benchmarks.gpu_check` as tables on the terminal and as markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import markdown_table

SPEED_COLUMNS = (
    "shape",
    "frozen weights",
    "prompt : response",
    "pairs",
    "TRL / ours",
    "range",
    "ms TRL",
    "ms ours",
    "positions TRL",
    "ours",
    "peak GiB TRL",
    "ours",
    "MFU ours",
    "loss apart",
    "gradients apart",
)
Results = Mapping[str, Any]


def print_checks(groups: Mapping[str, Mapping[str, Results]]) -> None:
    """Print a table for each group of checks."""
    for group, checks in groups.items():
        table = Table(title=group, title_justify="left")
        for column in ("check", "ok", "figures"):
            table.add_column(column)
        for name, check in checks.items():
            table.add_row(name, "yes" if check["ok"] else "NO", _figures(check))
        Console(width=170).print(table)


def _figures(check: Results) -> str:
    figures = {name: value for name, value in check.items() if name != "ok"}
    return ", ".join(f"{k} {v:.1e}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())


def print_speed(cases: Sequence[Results]) -> None:
    """Print the results of the cases that have been timed so far."""
    table = Table(title="Speed: the peer's step time / ours", title_justify="left")
    for column in SPEED_COLUMNS:
        table.add_column(column, justify="right")
    for case in cases:
        table.add_row(*_speed(case))
    Console(width=190).print(table)


def _speed(case: Results) -> list[str]:
    names = [str(case[name]) for name in ("shape", "weights", "lengths", "pairs")]
    if "error" in case:
        return [*names, case["error"][:60]]
    ratios = case["ratios"]
    return [
        *names,
        f"{case['ratio']:.2f}×",
        f"{min(ratios):.2f} – {max(ratios):.2f}",
        *(f"{1000 * statistics.median(case[side]['seconds']):.0f}" for side in ("peer", "ours")),
        *(f"{count:,}" for count in case.get("positions", (0, 0))),
        *(f"{case[side]['allocated']:.1f}" for side in ("peer", "ours")),
        "–" if case["mfu"] is None else f"{case['mfu']:.1%}",
        *(f"{case[name]:.0e}" if name in case else "–" for name in ("loss_apart", "gradients_apart")),
    ]


def as_markdown(results: Results) -> str:
    """Return all results so far, as a section of a page."""
    about = results["about"]
    versions = ", ".join(f"{name} {number}" for name, number in about.items() if name not in ("device", "date"))
    lines = [
        "## On a GPU",
        "",
        f"Printed by `python -m benchmarks.gpu_check` on {about.get('date')}: {about['device']}, {versions}.",
    ]
    if results.get("speed"):
        rows = [_speed(case) + [""] * (len(SPEED_COLUMNS) - len(_speed(case))) for case in results["speed"]]
        lines += ["", *markdown_table(SPEED_COLUMNS, rows)]
    groups = {**results.get("correctness", {}), "every loss trains as on the CPU": results.get("losses", {})}
    rows = [
        [group, f"{sum(check['ok'] for check in checks.values())} of {len(checks)}"]
        for group, checks in groups.items()
        if checks
    ]
    if rows:
        lines += ["", *markdown_table(("checks", "passed"), rows)]
    profile = results.get("profile", {})
    if profile:
        columns = (
            "a step of",
            "launches",
            "waits of the host",
            "ms of kernels",
            "ms until Python returned",
            "ms until done",
        )
        rows = [
            [
                side,
                f"{found['launches']:,}",
                str(sum(found["waits"].values())),
                *(f"{value:.0f}" for value in (found["kernel ms"], *found["host ms"].values())),
            ]
            for side, found in profile.items()
        ]
        lines += ["", *markdown_table(columns, rows)]
    return "\n".join(lines) + "\n"
