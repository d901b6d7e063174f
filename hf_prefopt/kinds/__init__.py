"""The kinds of examples that losses compare: pairs, triples, single responses with a label, and lists."""

from collections.abc import Iterable

from hf_prefopt.kinds.kind import STATISTICS, ExampleKind, Metric, OptionalColumn, Statistic
from hf_prefopt.kinds.lists import LISTS
from hf_prefopt.kinds.pairs import PAIRS
from hf_prefopt.kinds.triples import TRIPLES
from hf_prefopt.kinds.unpaired import UNPAIRED

# Whatever depends on the kind of examples is in its class; another kind is another entry. A kind that holds another one
# stands behind it, so that a loss is of the first that has all its inputs.
KINDS: tuple[ExampleKind, ...] = (PAIRS, TRIPLES, UNPAIRED, LISTS)

# The entries of a batch that have an element for each example.
EXAMPLE_ENTRIES = tuple(
    {name for kind in KINDS for name in (*kind.responses.values(), *kind.batch_inputs, "rows", "pair_in_row")}
)

__all__ = [
    "EXAMPLE_ENTRIES",
    "KINDS",
    "LISTS",
    "PAIRS",
    "STATISTICS",
    "TRIPLES",
    "UNPAIRED",
    "ExampleKind",
    "Metric",
    "OptionalColumn",
    "Statistic",
    "kind_of_columns",
]


def kind_of_columns(columns: Iterable[str]) -> ExampleKind | None:
    """The kind of the examples that prepared rows of these columns hold, or `None` where it is no known one."""
    present = set(columns)
    fitting = [kind for kind in KINDS if present.issuperset(kind.columns)]
    return max(fitting, key=lambda kind: len(kind.columns), default=None)
