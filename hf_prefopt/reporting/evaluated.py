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
        reward_margins: `[B]`, the difference of the loss's own rewards, chosen − rejected; NaN where an example does
            not compare. `None` if the loss has no rewards.
    """

    rows: np.ndarray
    pair_in_row: np.ndarray
    responses: Responses
    reward_margins: np.ndarray | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], rewards: Tensor | None = None) -> "Examples | None":
        """From the joined inputs of an evaluation and the rewards; `None` if its responses were not observed."""
        if Responses.of(inputs) is None:
            return None
        rows, places = (inputs[name].numpy() for name in ("rows", "pair_in_row"))
        order = np.lexsort((places, rows))
        responses = Responses.of({name: values[order] for name, values in inputs.items()})
        if responses is None:
            return None
        margins = None
        if rewards is not None:
            margins = responses.difference(rewards[order].double().numpy()[:, : responses.lengths.shape[1]])
        return cls(rows[order], places[order], responses, margins)

    @property
    def margins(self) -> np.ndarray | None:
        """`[B]`: those of the loss's rewards or, if it has none, of log-ratios to the reference."""
        return self.responses.margins if self.reward_margins is None else self.reward_margins

    def same_as(self, other: "Examples") -> bool:
        """Whether these are the same rows."""
        return np.array_equal(self.rows, other.rows) and np.array_equal(self.pair_in_row, other.pair_in_row)


@dataclass
class EvaluatedSets:
    """The first and the last evaluation of each data set, and of all of them the margins.

    Attributes:
        first, last: the step and the examples, by the prefix of the data set's metrics, such as "eval".
        margins: the margins of the examples by step: of the loss's rewards or, if it has none, of log-ratios.
    """

    first: dict[str, tuple[int, Examples]] = field(default_factory=dict)
    last: dict[str, tuple[int, Examples]] = field(default_factory=dict)
    margins: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)

    def forget(self) -> None:
        """Forget all evaluations: there is another model."""
        for kept in (self.first, self.last, self.margins):
            kept.clear()

    def keep(self, name: str, step: int, examples: Examples | None) -> dict[str, float]:
        """Keep an evaluation.

        Returns:
            Without a reference, `log_ratios/chosen` and `log_ratios/rejected` since the evaluation at step 0, where
            there was one of the same rows: mean change of log π in nats per token.
        """
        if examples is None:
            return {}
        if step == 0 or name not in self.first or not examples.same_as(self.first[name][1]):
            self.first[name], self.margins[name] = (step, examples), {}
        self.last[name] = step, examples
        if (margins := examples.margins) is not None:
            self.margins[name][step] = margins
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
