"""The last thing that a run prints: what the training changed, where its results are, and what to do next."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from hf_prefopt.reporting.table import evaluation_table


def closing_report(
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    pairs: int,
    results: Mapping[str, str | Path],
    next_steps: Mapping[str, str],
    console: Console | None = None,
) -> None:
    """Prints the table before → after, the results with their paths, and the next steps with their commands.

    Args:
        before, after: evaluations as `trainer.evaluate()` returns them; without `after` there is no table.
        pairs: how many pairs were evaluated.
        results: path by name, as in `{"adapter": "runs/dpo_lora"}`.
        next_steps: command by purpose, as in `{"another loss": "--loss_type simpo"}`.
        console: where to print; standard output by default.
    """
    console = console or Console()
    console.print()
    if after is not None:
        console.print(evaluation_table(before, after, pairs))
        console.print()
    _print_aligned(console, {name: str(path) for name, path in results.items()})
    if next_steps:
        console.print("\n[bold]Next steps[/bold]")
        _print_aligned(console, next_steps)


def _print_aligned(console: Console, entries: Mapping[str, str]) -> None:
    """Two columns. Paths and commands stay on one line, whole, so that they can be copied."""
    width = max((len(name) for name in entries), default=0)
    for name, text in entries.items():
        console.print(f"  {name:<{width}}  {text}", soft_wrap=True, markup=False, highlight=False)
