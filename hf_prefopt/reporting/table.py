"""Build the table of a run's results for the terminal."""

from rich.markup import escape
from rich.table import Table

from hf_prefopt.reporting.results import Results


def evaluation_table(results: Results) -> Table:
    """Build the table of results before and after training, with one row per metric. Rewards and loss are in nats."""
    number = "" if results.examples is None else f"{results.examples:,} "
    table = Table(title=f"Evaluation on {number}held-out examples", title_justify="left", title_style="bold")
    table.add_column("")
    for heading, _ in results.columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for label, cells in results.rows():
        table.add_row(label, *map(escape, cells))
    table.caption = escape("\n".join([plain_caption(results), *results.verdicts()]))
    table.caption_justify = "left"
    return table


def plain_caption(results: Results) -> str:
    """Return the caption of the table, which explains the intervals in brackets."""
    accuracy = results.accuracies.get("after")
    counted = ""
    if accuracy is not None and accuracy.prompts < accuracy.examples:
        prompts = "1 prompt counts" if accuracy.prompts == 1 else f"{accuracy.prompts:,} prompts count"
        counted = f"; {prompts}, not {accuracy.examples:,} examples"
    return f"[ ]: 95% confidence interval; a tie counts half{counted}"
