"""The kinds of examples that losses compare: pairs, triples, single responses with a label or a quantile, and lists."""

from collections.abc import Iterable

from hf_prefopt.kinds.kind import STATISTICS, ExampleKind, Metric, OptionalColumn, Statistic
from hf_prefopt.kinds.lists import LISTS
from hf_prefopt.kinds.pairs import PAIRS
from hf_prefopt.kinds.scored import SCORED
from hf_prefopt.kinds.triples import TRIPLES
from hf_prefopt.kinds.unpaired import UNPAIRED

# The kind of a loss is the first of these kinds that provides all inputs of the loss. If a kind provides all inputs of
# another kind, as triples do for pairs, it must come after that kind. docs/design.md lists what else a new kind needs.
KINDS: tuple[ExampleKind, ...] = (PAIRS, TRIPLES, UNPAIRED, SCORED, LISTS)

# Names of the batch entries that have one element for each example.
EXAMPLE_ENTRIES = tuple(
    {name for kind in KINDS for name in (*kind.responses.values(), *kind.batch_inputs, "rows", "pair_in_row")}
)

__all__ = [
    "EXAMPLE_ENTRIES",
    "KINDS",
    "LISTS",
    "PAIRS",
    "SCORED",
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
    """Return the kind of the examples in prepared rows with these columns, or `None` if no kind has these columns."""
    present = set(columns)
    fitting = [kind for kind in KINDS if present.issuperset(kind.columns)]
    return max(fitting, key=lambda kind: len(kind.columns), default=None)
