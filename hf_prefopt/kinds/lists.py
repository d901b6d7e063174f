"""Lists: several responses to one prompt, with ranks or scores. The number of responses may differ between lists."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_prefopt.kinds.kind import WEIGHT, ExampleKind, Metric, row_numbers


class Lists(ExampleKind):
    """Lists of responses.

    Batch entries, `[B, K]` each, where K is the length of the longest list:
        `list_responses`: int64. Indices of the responses.
        `list_mask`: bool. False for padding.
        `list_ranks`: float32. Smaller is better.
        `list_scores`: float32. Larger is better.
    """

    name = "lists"
    wanted = "lists: rows with `responses` and `ranks` or `scores`"
    columns = ("ranks", "scores")
    responses = {"list": "list_responses"}  # noqa: RUF012
    optional_columns = {"weights": WEIGHT}  # noqa: RUF012
    batch_inputs = ("list_mask", "list_ranks", "list_scores", *optional_columns)
    rewarded = ("list",)
    metric_inputs = ("policy_list_logps", "list_mask", "list_ranks")
    has_token_inputs = False

    def index(self, rows: Sequence[Mapping[str, Any]], places: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Return the batch entries. Each row is one example. Padding is 0, and False in `list_mask`."""
        return {
            "list_responses": _padded(
                [at[: len(row["ranks"])] for row, at in zip(rows, places, strict=True)], np.int64
            ),
            **self.batch_inputs_of(rows),
            **row_numbers(rows, [1] * len(rows)),
        }

    def count_examples(self, row: Mapping[str, Any]) -> int:
        """Return 1, because the list is one example."""
        return 1

    def count_rewards(self, inputs: Mapping[str, Tensor]) -> int:
        """Return K, the length of the longest list in the batch, because rewards are padded to this length."""
        return next(tensor.shape[1] for tensor in inputs.values() if tensor.dim() == 2)

    def batch_inputs_of(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Also return `list_mask`, `list_ranks` and `list_scores`, `[B, K]`. Scores are 0 for rows with only ranks."""
        ranks = [row["ranks"] for row in rows]
        return {
            "list_mask": _padded([np.ones(len(given)) for given in ranks], bool),
            "list_ranks": _padded(ranks, np.float32),
            "list_scores": _padded([row["scores"] or [0.0] * len(row["ranks"]) for row in rows], np.float32),
            **super().batch_inputs_of(rows),
        }

    def metrics(self, rewards: Tensor | None, inputs: Mapping[str, Tensor]) -> dict[str, Metric]:
        """Return metrics of the best response of each list, the one with the smallest rank in the data.

        If several responses are best, metrics are means over them. The metrics are the log-prob, the reward, the
        accuracy and the margin. The accuracy is 1 if the best response has the highest reward, else 0. If several
        responses have the highest reward, it is the share of best responses among them. The margin is the reward of the
        best response minus the mean reward of the other responses. It is undefined for lists without other responses.
        """
        mask = inputs["list_mask"]
        best = best_of(inputs["list_ranks"], mask)
        metrics = {"logps/best": Metric(mean_of(inputs["policy_list_logps"], best))}
        if rewards is not None:
            rewards = rewards[:, : mask.shape[1]]
            highest = rewards.masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True)
            at_top, others = (rewards == highest) & mask, mask & ~best
            metrics |= {
                "rewards/best": Metric(mean_of(rewards, best)),
                "rewards/accuracies": Metric(mean_of(best.to(rewards.dtype), at_top)),
                "rewards/margins": Metric(mean_of(rewards, best) - mean_of(rewards, others), others.any(1)),
            }
        return metrics

    def preferred(self, shown: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return 1 for the best responses of each list, 0 for the others."""
        best = best_of(inputs["list_ranks"], inputs["list_mask"]).to(shown)
        return F.pad(best, (0, shown.shape[1] - best.shape[1]))

    def refusal(self, row: Mapping[str, Any], inputs: Sequence[str]) -> str | None:
        """Return the reason of the base class, or a reason if the loss compares scores and the row has none."""
        if "list_scores" in inputs and not row.get("scores"):
            return "it compares scores, but these rows have only `ranks`: add a column `scores`"
        return super().refusal(row, inputs)


def best_of(ranks: Tensor, mask: Tensor) -> Tensor:
    """Return `[B, K]` bool: True for each response that has the smallest rank of its list."""
    ranks = ranks.masked_fill(~mask, torch.inf)
    return (ranks == ranks.amin(dim=1, keepdim=True)) & mask


def mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """Return `[B]`: for each list, the mean of `values` where `chosen` is True; 0 if `chosen` is never True."""
    return torch.where(chosen, values, 0.0).sum(1) / chosen.sum(1).clamp(min=1)


def _padded(lists: Sequence[Any], dtype: Any) -> np.ndarray:
    padded = np.zeros((len(lists), max(map(len, lists))), dtype=dtype)
    for row, values in zip(padded, lists, strict=True):
        row[: len(values)] = values
    return padded


LISTS = Lists()
