"""The examples of evaluations, of which the first and the last of each data set are kept for reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from hf_prefopt.reporting.observed import Responses


@dataclass(frozen=True)
class Examples:
    """The examples of a data set, in its order.

    Attributes:
        rows: `[B]`, the number of each example's row in the data set as it was given.
        pair_in_row: `[B]`, its place among the examples of its row.
        responses: what was measured of its responses.
    """

    rows: np.ndarray
    pair_in_row: np.ndarray
    responses: Responses

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor]) -> "Examples | None":
        """From the joined inputs of an evaluation; `None` if its responses were not observed."""
        if Responses.of(inputs) is None:
            return None
        rows, places = (inputs[name].numpy() for name in ("rows", "pair_in_row"))
        order = np.lexsort((places, rows))
        responses = Responses.of({name: values[order] for name, values in inputs.items()})
        return None if responses is None else cls(rows[order], places[order], responses)

    def same_as(self, other: "Examples") -> bool:
        """Whether these are the same rows."""
        return np.array_equal(self.rows, other.rows) and np.array_equal(self.pair_in_row, other.pair_in_row)


@dataclass
class EvaluatedSets:
    """The first and the last evaluation of each data set.

    Attributes:
        first, last: the step and the examples, by the prefix of the data set's metrics, such as "eval".
    """

    first: dict[str, tuple[int, Examples]] = field(default_factory=dict)
    last: dict[str, tuple[int, Examples]] = field(default_factory=dict)

    def forget(self) -> None:
        """Forget all evaluations: there is another model."""
        self.first.clear()
        self.last.clear()

    def keep(self, name: str, step: int, examples: Examples | None) -> dict[str, float]:
        """Keep an evaluation.

        Returns:
            Without a reference, `log_ratios/chosen` and `log_ratios/rejected` since the evaluation at step 0, where
            there was one of the same rows: mean change of log π in nats per token.
        """
        if examples is None:
            return {}
        if step == 0 or name not in self.first:
            self.first[name] = step, examples
        self.last[name] = step, examples
        change = self.change(name)
        if examples.responses.log_ratios is not None or change is None:
            return {}
        sides = {"chosen": change.chosen, "rejected": change.rejected}
        return {
            f"log_ratios/{side}": float(np.nanmean(change.side(change.log_ratios, which)))
            for side, which in sides.items()
            if which.any() and change.log_ratios is not None
        }

    def change(self, name: str) -> Responses | None:
        """The last evaluation with log-ratios to the reference or, without one, to step 0; `None` without either."""
        (_, last), (start, first) = self.last[name], self.first[name]
        if last.responses.log_ratios is not None:
            return last.responses
        return last.responses.since(first.responses) if start == 0 and last.same_as(first) else None
