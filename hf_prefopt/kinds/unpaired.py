"""Unpaired examples: one response, and whether it is desirable."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hf_prefopt.kinds.kind import WEIGHT, ExampleKind, Metric, row_numbers


class Unpaired(ExampleKind):
    """`responses`: `[B]` int64; `labels`: `[B]` bool, True for desirable; `mismatched`: `[B]` int64, another prompt's
    response behind this example's prompt, where a loss asks for it."""

    name = "unpaired examples"
    wanted = "rows with `label`, or pairs with unpair=True"
    columns = ("labels",)
    responses = {"": "responses", "mismatched": "mismatched"}  # noqa: RUF012
    optional_columns = {"weights": WEIGHT}  # noqa: RUF012
    batch_inputs = ("labels", *optional_columns)
    rewarded = ("",)
    metric_inputs = ("policy_logps", "labels")

    def index(self, rows: Sequence[Mapping[str, Any]], places: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Every response of a row is an example; its mismatched ones, where there are any, follow them."""
        counts = [len(row["labels"]) for row in rows]
        entries = {
            "responses": np.concatenate([at[:count] for at, count in zip(places, counts, strict=True)]),
            **self.batch_inputs_of(rows),
        }
        if "mismatched_ids" in rows[0]:
            entries["mismatched"] = np.concatenate([at[count:] for at, count in zip(places, counts, strict=True)])
        return {**entries, **row_numbers(rows, counts)}

    def batch_inputs_of(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """With `labels` `[B]` bool."""
        labels = np.concatenate([np.array(row["labels"], dtype=bool) for row in rows])
        return {"labels": labels, **super().batch_inputs_of(rows)}

    def metrics(self, rewards: Tensor | None, inputs: Mapping[str, Tensor]) -> dict[str, Metric]:
        """Means over the desirable ("chosen") and over the undesirable ("rejected") examples that there are."""
        metrics = {}
        for side, counted in (("chosen", inputs["labels"]), ("rejected", ~inputs["labels"])):
            if rewards is not None:
                metrics[f"rewards/{side}"] = Metric(rewards[:, 0], counted)
            metrics[f"logps/{side}"] = Metric(inputs["policy_logps"], counted)
        return metrics

    def finish_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """With the margin, the difference of the two mean rewards, where there were examples of both labels."""
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means

    def preferred(self, shown: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The label of each example."""
        return inputs["labels"].to(shown.dtype)[:, None]


UNPAIRED = Unpaired()
