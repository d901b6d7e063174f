"""Show the result of `inspect_dataset` in the terminal: how the dataset is read, its counts, and some of its rows."""

from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hf_prefopt.reporting.inspected import Inspection, events, facts
from hf_prefopt.reporting.preview import legend, render_row, visible

# Maximum number of characters shown of a prompt or of a response.
CHARACTERS = 1500


def print_inspection(
    inspection: Inspection, console: Console | None = None, characters: int | None = CHARACTERS
) -> None:
    """Print an inspection to the given console, or to standard output.

    Args:
        inspection: The inspection.
        console: The console; None uses standard output.
        characters: Maximum number of characters shown of a prompt or of a response; None shows all.
    """
    console = console or Console()
    console.print(render_inspection(inspection, characters))


def render_inspection(inspection: Inspection, characters: int | None = CHARACTERS) -> RenderableType:
    """Render an inspection for rich."""
    parts: list[RenderableType] = [
        Text(visible(inspection.name), style="bold"),
        _facts(inspection),
        Text(),
        _lengths(inspection),
    ]
    parts += _bullets("What happens to rows", [f"{what}: {count:,}" for what, count in events(inspection)], "yellow")
    parts += _bullets("Notes", inspection.remarks, "yellow")
    parts += _bullets("Training would stop", inspection.errors, "bold red")
    if inspection.rows:
        parts += [Text(), legend(), *(render_row(row, characters) for row in inspection.rows)]
    return Group(*parts)


def _facts(inspection: Inspection) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    for name, value in facts(inspection):
        table.add_row(name, Text(visible(value)))
    return table


def _lengths(inspection: Inspection) -> Table:
    table = Table("tokens", box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("median", "95% up to", "longest"):
        table.add_column(heading, justify="right")
    for name, lengths in inspection.summary.lengths.items():
        table.add_row(name, f"{lengths.median:,}", f"{lengths.p95:,}", f"{lengths.longest:,}")
    return table


def _bullets(heading: str, lines: Iterable[str], style: str) -> list[RenderableType]:
    """Return a heading and one bullet per line. Return [] if there are no lines."""
    bullets = Table.grid(padding=(0, 1))
    for line in lines:
        bullets.add_row("·", Text(visible(line)))
    return [Text(), Text(heading, style=style), bullets] if bullets.row_count else []
