"""Scored responses: single responses, each with its reward's quantile among rewards of the reference's responses."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hf_prefopt.kinds.kind import WEIGHT, ExampleKind, Metric, row_numbers


class Scored(ExampleKind):
    """Single responses with quantiles.

    Batch entries:
        `responses`: `[B]` int64. Indices of the responses.
        `quantiles`: `[B]` float32, 0 to 1. The quantile of the response's reward among the rewards of the reference's
            responses to the same prompt.
    """

    name = "scored responses"
    wanted = "rows with one response and its `quantile`, a number from 0 to 1"
    columns = ("quantiles",)
    responses = {"": "responses"}  # noqa: RUF012
    optional_columns = {"weights": WEIGHT}  # noqa: RUF012
    batch_inputs = ("quantiles", *optional_columns)
    rewarded = ("",)
    metric_inputs = ("policy_logps", "quantiles")
    has_preferences = False

    def index(self, rows: Sequence[Mapping[str, Any]], places: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Return the batch entries. Each response of a row is an example."""
        counts = [len(row["quantiles"]) for row in rows]
        return {"responses": np.concatenate(places), **self.batch_inputs_of(rows), **row_numbers(rows, counts)}

    def batch_inputs_of(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Also return `quantiles`, `[B]` float32."""
        quantiles = np.concatenate([np.array(row["quantiles"], dtype=np.float32) for row in rows])
        return {"quantiles": quantiles, **super().batch_inputs_of(rows)}

    def metrics(self, rewards: Tensor | None, inputs: Mapping[str, Tensor]) -> dict[str, Metric]:
        """Return quantile, log-prob and, if the loss has rewards, reward of each response."""
        metrics = {"quantiles": Metric(inputs["quantiles"]), "logps/responses": Metric(inputs["policy_logps"])}
        return metrics if rewards is None else {"rewards/responses": Metric(rewards[:, 0]), **metrics}

    def preferred(self, shown: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the quantile of each response, because the data define no preferred responses."""
        return inputs["quantiles"].to(shown.dtype)[:, None]


SCORED = Scored()
