"""What a kind of examples is: how losses name its tensors, where the collator finds them, and what is measured.

An example is what a loss gives one number for: a pair of responses, one labeled response, or a list of them. The
responses of a batch stand in one flat order (R); a kind says, for each of its B examples, which of them it compares.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistic:
    """What it takes of the heads, besides the log-probs of the tokens, to tell a loss something of a response.

    Attributes:
        own: per-token statistics of the model's own head.
        of_reference: those of the reference's, which is then scored first.
    """

    own: tuple[str, ...] = ()
    of_reference: tuple[str, ...] = ()


# What a loss may ask of a response under a model; see `objective.objective.ResponseStatistics`.
STATISTICS: dict[str, Statistic] = {
    "logps": Statistic(),
    "token_logps": Statistic(),
    "alignment": Statistic(("log_sum_sq_probs",)),
    "entropy": Statistic(("entropy",)),
    "normalized_entropy": Statistic(("normalized_entropy",)),
    "kl": Statistic(("vocabulary_kl",), of_reference=("hidden",)),
}


@dataclass(frozen=True)
class OptionalColumn:
    """A number that each example may have beside what its kind needs: a prepared column, and an input of losses.

    Attributes:
        columns: the names that people have for the column in a raw row; the first is the one to offer.
        default: what an example without it has; `None` where a loss that asks for it cannot do without.
        low, high: the values allowed, both included.
    """

    columns: tuple[str, ...]
    default: float | None = None
    low: float = -np.inf
    high: float = np.inf


WEIGHT = OptionalColumn(("weight", "sample_weight"), default=1.0, low=0.0)


@dataclass(frozen=True)
class Metric:
    """A metric of the examples of a batch.

    Attributes:
        values: `[B]`.
        counted: `[B]` bool, the examples that have it; `None` for all of them.
    """

    values: Tensor
    counted: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The sum over the examples that count, in float64."""
        values = self.values.detach().double()
        return (values if self.counted is None else torch.where(self.counted, values, 0.0)).sum()

    @property
    def count(self) -> Tensor | int:
        """How many examples count."""
        return len(self.values) if self.counted is None else self.counted.sum()


class ExampleKind(ABC):
    """A kind of examples. Losses say by the names of their parameters which one they compare.

    Attributes:
        name: what the examples are called.
        wanted: the rows that a data set of such examples has, for error messages.
        columns: the prepared columns by which a data set of such examples is recognized; the first has an entry for
            each example.
        responses: maps the name of a response in the parameters of losses (`chosen` in `policy_chosen_logps`) to the
            entry of the batch that has its indices into R.
        batch_inputs: entries of the batch that losses take as they are, the optional columns among them.
        optional_columns: numbers that an example may also have, by the name of the prepared column and of the input.
        rewarded: the names of the responses that have implicit rewards, in the order of the rewards' columns.
        metric_inputs: inputs that the metrics read, whatever the loss does.
        has_token_inputs: whether losses may ask for `..._token_logps` and `..._token_mask`.
    """

    name: str
    wanted: str
    columns: tuple[str, ...]
    responses: Mapping[str, str]
    batch_inputs: tuple[str, ...] = ()
    optional_columns: Mapping[str, OptionalColumn]
    rewarded: tuple[str, ...]
    metric_inputs: tuple[str, ...]
    has_token_inputs: bool = True

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        which = "|".join(f"{name}_" if name else "" for name in sorted(self.responses, reverse=True))
        per_token = "|token_mask" if self.has_token_inputs else ""
        stat = "|".join(name for name in STATISTICS if self.has_token_inputs or not name.startswith("token_"))
        return re.compile(
            rf"(?P<model>policy|ref)_(?P<which>{which})(?P<statistic>{stat})|(?P<of>{which})(?P<length>lengths{per_token})"
        )

    def has_input(self, name: str) -> bool:
        """Whether a loss's parameter of that name is an input of such examples."""
        return name in self.batch_inputs or self._pattern.fullmatch(name) is not None

    def statistic(self, name: str) -> str | None:
        """The statistic of a response that an input is made of; `None` for lengths and entries of the batch."""
        match = self._pattern.fullmatch(name)
        return match["statistic"] if match else None

    def input_of(self, name: str, batch: Mapping[str, Any], scores: Mapping[str, Any]) -> Tensor:
        """The input of that name of a batch's examples; gradients flow to the policy's scores.

        Args:
            scores: the `ResponseStatistics` of "policy" and "ref".
        """
        if name in self.batch_inputs:
            return batch[name] if name in batch else self._left_out(name, batch)
        match = self._pattern.fullmatch(name)
        which = match["which"] if match["model"] else match["of"]
        places = batch[self.responses[which.removesuffix("_")]]
        return getattr(scores[match["model"] or "policy"], match["statistic"] or match["length"])[places]

    def _left_out(self, name: str, batch: Mapping[str, Any]) -> Tensor:
        """What examples have whose rows say nothing of it."""
        default = self.optional_columns[name].default if name in self.optional_columns else None
        if default is None:
            raise ValueError(f"a loss asks for `{name}`, and rows of this batch have none")
        return torch.full(batch["rows"].shape, default, device=batch["rows"].device)

    def default_rewards(self, arguments: Mapping[str, Any], beta: float) -> Tensor | None:
        """β·(s − s_ref) `[B, K]`, the implicit reward of a loss that returns only its losses."""
        stems = [f"{name}_logps" if name else "logps" for name in self.rewarded]
        if any(f"policy_{stem}" not in arguments for stem in stems):
            return None
        return beta * _columns([arguments[f"policy_{s}"] - arguments.get(f"ref_{s}", 0.0) for s in stems]).detach()

    def count_rewards(self, inputs: Mapping[str, Tensor]) -> int:
        """How many columns the rewards have of examples whose inputs these are."""
        return len(self.rewarded)

    def predictions(self, rewards: Tensor | None, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `compute_metrics` is given, `[B, K]` each: the rewards (or log-probs), and 1 for what is preferred."""
        stems = [f"{name}_logps" if name else "logps" for name in self.rewarded]
        shown = _columns([inputs[f"policy_{stem}"] for stem in stems]).detach() if rewards is None else rewards
        return {"predictions": shown, "labels": self.preferred(shown, inputs)}

    def count_examples(self, row: Mapping[str, Any]) -> int:
        """How many examples a prepared row holds."""
        return len(row[self.columns[0]])

    def batch_inputs_of(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """What prepared rows say of their examples, in the order of the rows: the `batch_inputs` that they have."""
        present = [name for name in self.optional_columns if name in rows[0]]
        return {name: np.concatenate([np.array(row[name], dtype=np.float32) for row in rows]) for name in present}

    @abstractmethod
    def index(self, rows: Sequence[Mapping[str, Any]], places: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The examples of prepared rows, in the order of the rows, as entries of the batch.

        Args:
            rows: prepared rows.
            places: for each row, where its responses stand in the batch's flat order.

        Returns:
            This kind's entries, and `rows`, `pair_in_row` `[B]` int64: each example's row in its data set, and its
            place among that row's examples.
        """

    @abstractmethod
    def metrics(self, rewards: Tensor | None, inputs: Mapping[str, Tensor]) -> dict[str, Metric]:
        """The metrics of the examples, by the names they are logged under."""

    def finish_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """The means of the metrics, and what follows from them."""
        return means

    @abstractmethod
    def preferred(self, shown: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """As `shown` `[B, K]`: 1 for what the data prefer, 0 for the rest."""

    def refusal(self, row: Mapping[str, Any], inputs: Sequence[str]) -> str | None:
        """Why a data set with such a row cannot give these inputs, or `None`."""
        for name in inputs:
            if name in self.optional_columns and self.optional_columns[name].default is None and name not in row:
                column, *others = self.optional_columns[name].columns
                known = f" (or {', '.join(others)})" if others else ""
                return f"it needs a number for every row in a column `{column}`{known}, which is missing: add it"
        return None


def _columns(tensors: list[Tensor]) -> Tensor:
    """Vectors `[B]` side by side; what is a matrix `[B, K]` already stays one."""
    return torch.stack(tensors, dim=-1) if tensors[0].dim() == 1 else tensors[0]


def row_numbers(rows: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, np.ndarray]:
    """`rows` and `pair_in_row` of the examples, of which each row has so many."""
    return {
        "rows": np.repeat(np.array([row["row"] for row in rows], dtype=np.int64), counts),
        "pair_in_row": np.concatenate([np.arange(count) for count in counts]),
    }
