"""The interface of a kind of examples: the names of its loss inputs, its entries in a batch, and its metrics.

An example is a pair of responses, one labeled response, or a list of responses. A loss returns one number for each
example. A batch numbers its R responses from 0 to R - 1, and the kind defines which of them each of the B examples
compares.
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
    """The per-token statistics that a loss input requires from the language-model heads, in addition to log-probs.

    Attributes:
        own: statistics that the head computes for the model in the input's name, "policy" or "ref".
        of_reference: statistics that the head computes for the reference. If there are any, the reference is scored
            before the policy.
    """

    own: tuple[str, ...] = ()
    of_reference: tuple[str, ...] = ()


# Statistics of a response under a model that can be inputs of losses. `objective.objective` computes them.
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
    """An optional number for each example. It is a column of the prepared data and an input of losses.

    Attributes:
        columns: the column's accepted names in raw rows. Error messages suggest the first.
        default: the value for rows without the column. If it is `None`, losses that use the column require it.
        low, high: the allowed range, both ends included.
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
        values: `[B]`. The metric of each example.
        counted: `[B]` bool. True for the examples for which the metric is defined; `None` if it is defined for all.
    """

    values: Tensor
    counted: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """The sum over the examples for which the metric is defined, in float64."""
        values = self.values.detach().double()
        return (values if self.counted is None else torch.where(self.counted, values, 0.0)).sum()

    @property
    def count(self) -> Tensor | int:
        """The number of examples for which the metric is defined."""
        return len(self.values) if self.counted is None else self.counted.sum()


class ExampleKind(ABC):
    """A kind of examples. The parameter names of a loss determine the kind of examples that it compares.

    Attributes:
        name: the name of the kind, such as "pairs".
        wanted: a description of the rows that a dataset of this kind needs, for error messages.
        columns: the prepared columns that identify this kind. Except for lists, the first column has one entry for each
            example.
        responses: maps the name of a response, such as "chosen", to the batch entry with the indices of these responses
            (0 to R - 1). A loss's parameters contain this name: `{policy | ref}_{name}_{statistic}`.
        batch_inputs: entries of the batch that losses take unchanged, including the optional columns.
        optional_columns: the optional numbers of an example. The key is the name of the prepared column and of the
            input.
        rewarded: the names of the responses with implicit rewards, in the order of the columns of the rewards `[B, K]`.
        metric_inputs: the inputs that the metrics read. They are provided with every loss.
        has_token_inputs: whether losses can take `..._token_logps` and `..._token_mask`.
        has_preferences: whether the data define which responses are preferred.
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
    has_preferences: bool = True

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        which = "|".join(f"{name}_" if name else "" for name in sorted(self.responses, reverse=True))
        per_token = "|token_mask" if self.has_token_inputs else ""
        stat = "|".join(name for name in STATISTICS if self.has_token_inputs or not name.startswith("token_"))
        return re.compile(
            rf"(?P<model>policy|ref)_(?P<which>{which})(?P<statistic>{stat})|(?P<of>{which})(?P<length>lengths{per_token})"
        )

    def has_input(self, name: str) -> bool:
        """Return True if this kind provides a loss parameter of this name."""
        return name in self.batch_inputs or self._pattern.fullmatch(name) is not None

    def statistic(self, name: str) -> str | None:
        """Return the name of the statistic in an input's name; `None` for lengths, token masks and `batch_inputs`."""
        match = self._pattern.fullmatch(name)
        return match["statistic"] if match else None

    def input_of(self, name: str, batch: Mapping[str, Any], scores: Mapping[str, Any]) -> Tensor:
        """Return the input of this name for the examples of a batch. Gradients flow back to the policy's scores.

        Args:
            name: the name of the input.
            batch: the entries of the batch.
            scores: the `ResponseStatistics` of the models, keyed by "policy" and "ref".

        Raises:
            ValueError: if the rows lack a column that has no default.
        """
        if name in self.batch_inputs:
            return batch[name] if name in batch else self._left_out(name, batch)
        match = self._pattern.fullmatch(name)
        assert match is not None, f"{name} is not an input of {self.name}"
        which = match["which"] if match["model"] else match["of"]
        places = batch[self.responses[which.removesuffix("_")]]
        return getattr(scores[match["model"] or "policy"], match["statistic"] or match["length"])[places]

    def _left_out(self, name: str, batch: Mapping[str, Any]) -> Tensor:
        """Return the default value of an optional column for all examples, because the rows lack this column."""
        default = self.optional_columns[name].default if name in self.optional_columns else None
        if default is None:
            raise ValueError(
                f"a loss needs `{name}`, and the rows of this batch lack it: add the column, or choose another loss"
            )
        return torch.full(batch["rows"].shape, default, device=batch["rows"].device)

    def default_rewards(self, arguments: Mapping[str, Any], beta: float) -> Tensor | None:
        """Return the implicit rewards β·(s − s_ref), `[B, K]`, for a loss that returns no rewards.

        s and s_ref are the log-probs of a response under policy and reference. If the loss takes no log-probs of the
        reference, s_ref is 0. If it takes none of the policy, return `None`.
        """
        stems = [f"{name}_logps" if name else "logps" for name in self.rewarded]
        if any(f"policy_{stem}" not in arguments for stem in stems):
            return None
        return beta * _columns([arguments[f"policy_{s}"] - arguments.get(f"ref_{s}", 0.0) for s in stems]).detach()

    def count_rewards(self, inputs: Mapping[str, Tensor]) -> int:
        """Return K, the number of columns of the rewards `[B, K]` for these inputs."""
        return len(self.rewarded)

    def predictions(self, rewards: Tensor | None, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the arguments of `compute_metrics`: `predictions` and `labels`, `[B, K]` each.

        The predictions are the rewards, or the log-probs if the loss has no rewards. The labels are those of
        `preferred`.
        """
        stems = [f"{name}_logps" if name else "logps" for name in self.rewarded]
        shown = _columns([inputs[f"policy_{stem}"] for stem in stems]).detach() if rewards is None else rewards
        return {"predictions": shown, "labels": self.preferred(shown, inputs)}

    def count_examples(self, row: Mapping[str, Any]) -> int:
        """Return the number of examples in a prepared row."""
        return len(row[self.columns[0]])

    def batch_inputs_of(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Return those of the `batch_inputs` that prepared rows contain: one value for each example, in row order."""
        present = [name for name in self.optional_columns if name in rows[0]]
        return {name: np.concatenate([np.array(row[name], dtype=np.float32) for row in rows]) for name in present}

    @abstractmethod
    def index(self, rows: Sequence[Mapping[str, Any]], places: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Return the entries of the batch that describe the examples of prepared rows, in the order of the rows.

        Args:
            rows: prepared rows.
            places: for each row, the indices of its responses among the R responses of the batch.

        Returns:
            The entries of this kind, and two entries of every kind, `[B]` int64 each. `rows` has the index of each
            example's row in the dataset. `pair_in_row` has the index of each example among the examples of its row.
        """

    @abstractmethod
    def metrics(self, rewards: Tensor | None, inputs: Mapping[str, Tensor]) -> dict[str, Metric]:
        """Return the metrics of the examples, keyed by the names under which they are logged."""

    def finish_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Return the metrics to log, computed from the means over all examples."""
        return means

    @abstractmethod
    def preferred(self, shown: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return `[B, K]`, in the dtype of `shown`: 1 for the responses that the data prefer, 0 for the others."""

    def refusal(self, row: Mapping[str, Any], inputs: Sequence[str]) -> str | None:
        """Return why a dataset with this row cannot provide these inputs; `None` if it can."""
        optional = [self.optional_columns[name] for name in inputs if name in self.optional_columns and name not in row]
        missing = [column.columns[0] for column in optional if column.default is None]
        if not missing:
            return None
        return (
            f"columns of numbers are missing, {', '.join(map('`{}`'.format, missing))}: add them, or name yours, "
            f"column_mapping={dict.fromkeys(missing, '<your column>')}"
        )


def _columns(tensors: list[Tensor]) -> Tensor:
    """Stack K vectors `[B]` to a matrix `[B, K]`. If the first tensor is such a matrix already, return it."""
    return torch.stack(tensors, dim=-1) if tensors[0].dim() == 1 else tensors[0]


def row_numbers(rows: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> dict[str, np.ndarray]:
    """Return `rows` and `pair_in_row` (see `ExampleKind.index`). `counts` has the number of examples of each row."""
    return {
        "rows": np.repeat(np.array([row["row"] for row in rows], dtype=np.int64), counts),
        "pair_in_row": np.concatenate([np.arange(count) for count in counts]),
    }
