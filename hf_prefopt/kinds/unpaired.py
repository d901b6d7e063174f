"""Unpaired examples: single responses with a label, desirable or undesirable."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hf_prefopt.kinds.kind import WEIGHT, ExampleKind, Metric, row_numbers


class Unpaired(ExampleKind):
    """Single responses with labels.

    Batch entries:
        `responses`: `[B]` int64. Indices of the responses.
        `labels`: `[B]` bool. True if the response is desirable.
        `mismatched`: `[B]` int64. Only for losses that need it. Index of a response to another prompt that is scored
            after the prompt of this example.
    """

    name = "unpaired examples"
    wanted = "rows with `label`, or pairs with unpair=True, which splits each pair into two labeled rows"
    columns = ("labels",)
    responses = {"": "responses", "mismatched": "mismatched"}  # noqa: RUF012
    optional_columns = {"weights": WEIGHT}  # noqa: RUF012
    batch_inputs = ("labels", *optional_columns)
    rewarded = ("",)
    metric_inputs = ("policy_logps", "labels")

    def index(self, rows: Sequence[Mapping[str, Any]], places: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Return the batch entries. Each labeled response of a row is an example. Further responses are mismatched."""
        counts = [len(row["labels"]) for row in rows]
        entries = {
            "responses": np.concatenate([at[:count] for at, count in zip(places, counts, strict=True)]),
            **self.batch_inputs_of(rows),
        }
        if "mismatched_ids" in rows[0]:
            entries["mismatched"] = np.concatenate([at[count:] for at, count in zip(places, counts, strict=True)])
        return {**entries, **row_numbers(rows, counts)}

    def batch_inputs_of(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Also return `labels`, `[B]` bool."""
        labels = np.concatenate([np.array(row["labels"], dtype=bool) for row in rows])
        return {"labels": labels, **super().batch_inputs_of(rows)}

    def metrics(self, rewards: Tensor | None, inputs: Mapping[str, Tensor]) -> dict[str, Metric]:
        """Return reward and log-prob, separately for desirable ("chosen") and undesirable ("rejected") examples."""
        metrics = {}
        for side, counted in (("chosen", inputs["labels"]), ("rejected", ~inputs["labels"])):
            if rewards is not None:
                metrics[f"rewards/{side}"] = Metric(rewards[:, 0], counted)
            metrics[f"logps/{side}"] = Metric(inputs["policy_logps"], counted)
        return metrics

    def finish_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Add the margin, the mean reward of desirable minus that of undesirable examples, if there are both."""
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means

    def preferred(self, shown: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the label of each example: 1 if its response is desirable, 0 if not."""
        return inputs["labels"].to(shown.dtype)[:, None]


UNPAIRED = Unpaired()
