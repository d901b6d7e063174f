"""Pairs: a chosen and a rejected response to one prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_prefopt.examples.kind import ExampleKind, Figure, row_numbers


class Pairs(ExampleKind):
    """`chosen`, `rejected`: `[B]` int64, responses. A response may serve several pairs."""

    name = "pairs"
    wanted = "pairs: rows with `chosen` and `rejected`"
    columns = ("pairs",)
    responses = {"chosen": "chosen", "rejected": "rejected"}  # noqa: RUF012
    rewarded = ("chosen", "rejected")
    metric_inputs = ("policy_chosen_logps", "policy_rejected_logps")

    def index(self, rows: Sequence[Mapping[str, Any]], places: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """`chosen`, `rejected`, from the column `pairs`: (chosen, rejected) indices into the row's responses."""
        pairs = [
            at[np.array(row["pairs"], dtype=np.int64).reshape(-1, 2)] for row, at in zip(rows, places, strict=True)
        ]
        chosen, rejected = np.concatenate(pairs).T
        counts = [len(row["pairs"]) for row in rows]
        return {"chosen": chosen.copy(), "rejected": rejected.copy(), **row_numbers(rows, counts)}

    def made_up(self, name: str) -> Tensor:
        """Eight tokens, −4 nats."""
        return torch.full((2,), 8 if name.endswith("lengths") else -4.0)

    def figures(self, rewards: Tensor | None, inputs: Mapping[str, Tensor]) -> dict[str, Figure]:
        """Under TRL's names; a tie of rewards counts as half an accurate one."""
        figures = {}
        if rewards is not None:
            chosen, rejected = rewards[:, 0], rewards[:, 1]
            figures = {
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/accuracies": ((chosen > rejected).float() + (chosen >= rejected).float()) / 2,
                "rewards/margins": chosen - rejected,
            }
        figures |= {f"logps/{side}": inputs[f"policy_{side}_logps"] for side in ("chosen", "rejected")}
        return {name: Figure(values) for name, values in figures.items()}

    def preferred(self, shown: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """(1, 0) for every pair."""
        labels = torch.zeros_like(shown)
        labels[:, 0] = 1
        return labels


PAIRS = Pairs()
