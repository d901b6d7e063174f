"""The report at the end of a run: what training changed, where the results are, and what to do next."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from hf_prefopt.reporting.table import evaluation_table


def closing_report(
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    examples: int | None,
    results: Mapping[str, str | Path],
    next_steps: Mapping[str, str],
    console: Console | None = None,
) -> None:
    """Print the table before → after, the paths of the results, and the commands of the next steps.

    Args:
        before, after: evaluations, as `trainer.evaluate()` returns them; without `after` there is no table.
        examples: how many examples were evaluated; `None` if unknown.
        results: path by name, such as `{"model card": "runs/dpo_lora/README.md"}`.
        next_steps: command by purpose, such as `{"another loss": "--loss_type simpo"}`.
        console: where to print; standard output by default.
    """
    console = console or Console()
    console.print()
    if after is not None:
        console.print(evaluation_table(before, after, examples))
        console.print()
    _print_aligned(console, {name: str(path) for name, path in results.items()})
    if next_steps:
        console.print("\n[bold]Next steps[/bold]")
        _print_aligned(console, next_steps)


def _print_aligned(console: Console, entries: Mapping[str, str]) -> None:
    """Print two columns; paths and commands stay on one line, so that they can be copied."""
    width = max((len(name) for name in entries), default=0)
    for name, text in entries.items():
        console.print(f"  {name:<{width}}  {text}", soft_wrap=True, markup=False, highlight=False)
