"""Store the examples of the first and the last evaluation of each dataset, for reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from hf_prefopt.reporting.observed import Responses


@dataclass(frozen=True)
class Examples:
    """The examples of a dataset, in the order of its rows.

    Attributes:
        rows: `[B]`. Index of each example's row in the dataset that the user passed.
        pair_in_row: `[B]`. Index of each example among the examples of its row.
        responses: Measurements of the responses.
        reward_margins: `[B]`. Reward of the chosen response minus reward of the rejected response, with the rewards
            that the loss defines; NaN if an example has no chosen or no rejected response. `None` if the loss has no
            rewards.
    """

    rows: np.ndarray
    pair_in_row: np.ndarray
    responses: Responses
    reward_margins: np.ndarray | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], rewards: Tensor | None = None) -> "Examples | None":
        """Build the examples from the loss inputs and the rewards of all examples of an evaluation.

        Return `None` if the inputs have no entries that `observe` has added.
        """
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
        """`[B]`. Margins of the loss's rewards. If it has none, margins of the log-ratios to the reference."""
        return self.responses.margins if self.reward_margins is None else self.reward_margins

    def same_as(self, other: "Examples") -> bool:
        """Return True if both objects have the same examples: the same rows, and the same indices in these rows."""
        return np.array_equal(self.rows, other.rows) and np.array_equal(self.pair_in_row, other.pair_in_row)


@dataclass
class EvaluatedSets:
    """The first and the last evaluation of each dataset, and the margins of all evaluations.

    Attributes:
        first, last: Step and examples of the first and the last evaluation, keyed by the metric prefix of the dataset,
            such as "eval".
        margins: Margins of the examples (see `Examples.margins`), keyed first by metric prefix and then by step.
    """

    first: dict[str, tuple[int, Examples]] = field(default_factory=dict)
    last: dict[str, tuple[int, Examples]] = field(default_factory=dict)
    margins: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)

    def forget(self) -> None:
        """Remove all evaluations. Call this method when the model is replaced."""
        for kept in (self.first, self.last, self.margins):
            kept.clear()

    def keep(self, name: str, step: int, examples: Examples | None) -> dict[str, float]:
        """Store an evaluation, and return further metrics.

        Returns:
            If there is no reference and the same rows were evaluated at step 0: the metrics `log_ratios/chosen` and
            `log_ratios/rejected`, which are the mean change of log π since step 0, in nats per token. Otherwise, an
            empty dict.
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
        """Return the responses of the last evaluation, with log-ratios to the reference.

        Without a reference, the log-ratios are those to the model at step 0. Return `None` if there is neither a
        reference nor an evaluation of the same rows at step 0.
        """
        (_, last), (start, first) = self.last[name], self.first[name]
        if last.responses.log_ratios is not None:
            return last.responses
        return last.responses.since(first.responses) if start == 0 and last.same_as(first) else None
