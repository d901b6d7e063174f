"""The evaluation before and after training, side by side, with confidence intervals for shares.

It is made from the dicts that `trainer.evaluate()` returns; `closing` prints it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from rich.table import Table

# The two-sided 95 % point of the normal distribution.
Z_95 = 1.959964


@dataclass(frozen=True)
class Row:
    """A row of the table: the key of a metric, its name, and for a share the key of its sample size."""

    key: str
    label: str
    share_of: str | None = None


ROWS = (
    Row("eval_loss", "loss"),
    Row("eval_rewards/accuracies", "reward accuracy", share_of="examples"),
    Row("eval_rewards/margins", "reward margin"),
    Row("eval_rewards/chosen", "chosen reward"),
    Row("eval_rewards/rejected", "rejected reward"),
    Row("eval_rewards/best", "best reward"),
    Row("eval_gsm8k/exact_match", "GSM8K exact match", share_of="eval_gsm8k/problems"),
)


def wilson_interval(share: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of a share of n independent trials (E. B. Wilson 1927), 95 % by default.

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n). A share in which ties count half may be given: its variance is
    below p(1−p)/n, so the interval errs on the wide side. Several pairs of one prompt are not quite independent, which
    errs on the narrow side.

    Raises:
        ValueError: the share is outside [0, 1] or n is below 1.
    """
    if not 0.0 <= share <= 1.0 or n < 1:
        raise ValueError(f"a share of n trials needs 0 <= share <= 1 and n >= 1, got share={share!r}, n={n!r}")
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half_width = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def evaluation_table(before: Mapping[str, float] | None, after: Mapping[str, float], examples: int | None) -> Table:
    """The table before → after, with a row for each metric of the evaluation; rewards and loss in nats.

    Args:
        before: the evaluation before training; `None` leaves the column out.
        after: the evaluation after training.
        examples: how many examples were evaluated; `None` leaves the intervals of their shares out.
    """
    number = "" if examples is None else f"{examples:,} "
    table = Table(title=f"Evaluation on {number}held-out examples", title_justify="left", title_style="bold")
    table.add_column("")
    for heading, metrics in (("before", before), ("after", after)):
        if metrics is not None:
            table.add_column(heading, justify="right", no_wrap=True)
    for row in ROWS:
        if row.key in after:
            cells = [_cell(row, metrics, examples) for metrics in (before, after) if metrics is not None]
            table.add_row(row.label, *cells)
    table.caption = "[ ] 95 % Wilson interval; a tie counts half"
    table.caption_justify = "left"
    return table


def _cell(row: Row, metrics: Mapping[str, float], examples: int | None) -> str:
    """A number for the table: a share with its interval, anything else with four digits."""
    if row.key not in metrics:
        return "–"
    value = float(metrics[row.key]) + 0.0  # A negative zero becomes a plain one.
    if row.share_of is None:
        return f"{value:.4f}" if row.key == "eval_loss" else f"{value:+.4f}"
    size = examples if row.share_of == "examples" else int(metrics[row.share_of])
    if size is None:
        return f"{value:.3f}"
    low, high = wilson_interval(value, size)
    # The bracket is escaped: rich would read it as markup.
    return f"{value:.3f} \\[{low:.3f}, {high:.3f}]"
