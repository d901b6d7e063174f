"""The kinds of examples that losses compare: pairs, single responses with a label, and lists."""

from collections.abc import Iterable

from hf_prefopt.examples.kind import STATISTICS, ExampleKind, Extra, Figure, Statistic
from hf_prefopt.examples.lists import LISTS
from hf_prefopt.examples.pairs import PAIRS
from hf_prefopt.examples.unpaired import UNPAIRED

# Whatever depends on the kind of examples is in its class; another kind is another entry.
KINDS: tuple[ExampleKind, ...] = (PAIRS, UNPAIRED, LISTS)

# The entries of a batch that have an element for each example.
EXAMPLE_ENTRIES = tuple(
    {name for kind in KINDS for name in (*kind.responses.values(), *kind.facts, "rows", "pair_in_row")}
)

__all__ = [
    "EXAMPLE_ENTRIES",
    "KINDS",
    "LISTS",
    "PAIRS",
    "STATISTICS",
    "UNPAIRED",
    "ExampleKind",
    "Extra",
    "Figure",
    "Statistic",
    "kind_of_columns",
]


def kind_of_columns(columns: Iterable[str]) -> ExampleKind | None:
    """The kind of the examples that prepared rows of these columns hold, or `None` where it is no known one."""
    present = set(columns)
    return next((kind for kind in KINDS if present.issuperset(kind.columns)), None)
