"""The terminal report at the end of a run: results before and after training, output paths, and next steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_prefopt.reporting.preview import visible
from hf_prefopt.reporting.results import Results
from hf_prefopt.reporting.table import evaluation_table

NOT_EVALUATED = "The model was not evaluated after training: call trainer.evaluate() before finish_run(trainer)."
# Maximum number of characters of a prompt or an answer in the terminal.
_CHARACTERS = 360


def closing_report(
    evaluated: Results,
    results: Mapping[str, str | Path],
    next_steps: Mapping[str, str],
    console: Console | None = None,
    answers: Sequence[Mapping[str, str]] = (),
) -> None:
    """Print the answers, the results before and after training, the paths of the results, and commands for next steps.

    Args:
        evaluated: Results of the evaluations. If there is no evaluation after training, no table is printed.
        results: Paths, keyed by name, such as `{"model card": "runs/dpo_lora/README.md"}`.
        next_steps: Commands that the user may run next, keyed by purpose, such as
            `{"another loss": "--loss_type simpo"}`.
        console: Console that prints the report. Default: standard output.
        answers: Dicts with a `prompt` and the answers `before` and `after` training.
    """
    console = console or Console()
    console.print()
    if answers:
        console.print(answers_table(answers))
        console.print()
    if evaluated.after is not None:
        console.print(evaluation_table(evaluated))
        console.print()
    elif evaluated.before is not None:
        console.print(NOT_EVALUATED)
        console.print()
    _print_aligned(console, {name: str(path) for name, path in results.items()})
    if next_steps:
        console.print("\n[bold]Next steps[/bold]")
        _print_aligned(console, next_steps)


def answers_table(answers: Sequence[Mapping[str, str]]) -> Table:
    """Build a table of the answers before and after training. Terminal control characters are made visible."""
    table = Table(
        title="Greedy answers to prompts of the data",
        title_justify="left",
        title_style="bold",
        show_lines=True,
        expand=True,
    )
    for heading in ("prompt", "before", "after"):
        table.add_column(heading, ratio=1, overflow="fold")
    for answer in answers:
        texts = (answer["prompt"], answer["before"], answer["after"])
        table.add_row(*(escape(shortened(visible(text.strip()))) for text in texts))
    return table


def shortened(text: str, most: int = _CHARACTERS) -> str:
    """Replace the middle of a long text with an ellipsis."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-most // 3 :]}"


def _print_aligned(console: Console, entries: Mapping[str, str]) -> None:
    """Print names and texts in two columns. Each text stays on one line, so that users can copy paths and commands."""
    width = max((len(name) for name in entries), default=0)
    for name, text in entries.items():
        console.print(f"  {name:<{width}}  {text}", soft_wrap=True, markup=False, highlight=False)
