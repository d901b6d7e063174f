"""Pairs: a chosen and a rejected response to one prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_prefopt.kinds.kind import WEIGHT, ExampleKind, Metric, OptionalColumn, row_numbers


class Pairs(ExampleKind):
    """Pairs of a chosen and a rejected response.

    Batch entries:
        `chosen`, `rejected`: `[B]` int64. Indices of the responses. A response may belong to several pairs.
        `chosen_token_weights`, `rejected_token_weights`: `[B, T]` float32, where T is the number of scored tokens
            of the longest response. Optional. Pairs with the same response may have different weights for it.
        `weights`: `[B]` float32. Optional.
        `margins`: `[B]` float32, in units of rewards. Optional.
        `chosen_scores`, `rejected_scores`: `[B]` float32. Optional.
        `chosen_win_rates`, `rejected_win_rates`: `[B]` float32. Optional. Win rate of the response against all samples
            for the prompt.
    """

    name = "pairs"
    wanted = "pairs: rows with `chosen` and `rejected`"
    columns: tuple[str, ...] = ("pairs",)
    responses = {"chosen": "chosen", "rejected": "rejected", "prompt": "prompts"}  # noqa: RUF012
    optional_columns = {  # noqa: RUF012
        "weights": WEIGHT,
        "margins": OptionalColumn(("margin",), default=0.0),
        "chosen_scores": OptionalColumn(("chosen_score", "score_chosen", "chosen_rating", "chosen-rating")),
        "rejected_scores": OptionalColumn(("rejected_score", "score_rejected", "rejected_rating", "rejected-rating")),
        "chosen_win_rates": OptionalColumn(("chosen_win_rate", "win_rate", "p_chosen"), low=0.0, high=1.0),
        "rejected_win_rates": OptionalColumn(("rejected_win_rate", "p_rejected"), low=0.0, high=1.0),
    }
    batch_inputs = ("rows", "pair_in_row", "chosen_token_weights", "rejected_token_weights", *optional_columns)
    rewarded = ("chosen", "rejected")
    metric_inputs: tuple[str, ...] = ("policy_chosen_logps", "policy_rejected_logps")

    def index(self, rows: Sequence[Mapping[str, Any]], places: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Return the batch entries. The column `pairs` has, for each pair, indices [chosen, rejected] into its row."""
        pairs = [
            at[np.array(row["pairs"], dtype=np.int64).reshape(-1, 2)] for row, at in zip(rows, places, strict=True)
        ]
        chosen, rejected = np.concatenate(pairs).T
        counts = [len(row["pairs"]) for row in rows]
        indices = {"chosen": chosen.copy(), "rejected": rejected.copy()}
        weights = _token_weights(rows) if all("token_weights" in row for row in rows) else {}
        return {**indices, **weights, **self.batch_inputs_of(rows), **row_numbers(rows, counts)}

    def refusal(self, row: Mapping[str, Any], inputs: Sequence[str]) -> str | None:
        """Return the reason of the base class, or a reason if the loss needs token weights and the row has none."""
        if "chosen_token_weights" in inputs and "token_weights" not in row:
            return (
                "it weights tokens, but these rows have no weights: provide prompt_ids, chosen_ids and rejected_ids "
                "with chosen_token_weights and rejected_token_weights, a number for each token"
            )
        return super().refusal(row, inputs)

    def metrics(self, rewards: Tensor | None, inputs: Mapping[str, Tensor]) -> dict[str, Metric]:
        """Return metrics with TRL's names. If both rewards of a pair are equal, its accuracy is ½."""
        metrics = {}
        if rewards is not None:
            chosen, rejected = rewards[:, 0], rewards[:, 1]
            metrics = {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/accuracies": ((chosen > rejected).float() + (chosen >= rejected).float()) / 2,
                "rewards/margins": chosen - rejected,
            }
        metrics |= {f"logps/{side}": inputs[f"policy_{side}_logps"] for side in ("chosen", "rejected")}
        return {name: Metric(values) for name, values in metrics.items()}

    def preferred(self, shown: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return 1 for the chosen and 0 for the rejected response of every pair."""
        labels = torch.zeros_like(shown)
        labels[:, 0] = 1
        return labels


def _token_weights(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return the weights of the scored tokens of each pair's responses, `[B, T]` each. Padding is 0."""
    scored = [
        [
            np.asarray(weights, dtype=np.float32)[np.asarray(mask, dtype=bool)]
            for weights, mask in zip(*both, strict=True)
        ]
        for both in ((row["token_weights"], row["scored_masks"]) for row in rows)
    ]
    width = max(len(weights) for row in scored for weights in row)
    sides: dict[str, np.ndarray] = {}
    for side, name in enumerate(("chosen_token_weights", "rejected_token_weights")):
        of_pairs = [weights[pair[side]] for weights, row in zip(scored, rows, strict=True) for pair in row["pairs"]]
        sides[name] = np.stack([np.pad(weights, (0, width - len(weights))) for weights in of_pairs])
    return sides


PAIRS = Pairs()
