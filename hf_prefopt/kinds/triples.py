"""Triples: a pair and a third, gold response to the same prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hf_prefopt.kinds.kind import Metric
from hf_prefopt.kinds.pairs import Pairs


class Triples(Pairs):
    """Pairs with a gold response. A loss for pairs can also be used and ignores the gold response.

    Batch entries: those of pairs, and `gold`, `[B]` int64, the index of the gold response.
    """

    name = "triples"
    wanted = "triples: rows with `chosen`, `rejected` and a third, gold response in `reference`"
    columns = ("pairs", "golds")
    responses = {**Pairs.responses, "gold": "gold"}  # noqa: RUF012
    metric_inputs = (*Pairs.metric_inputs, "policy_gold_logps")

    def index(self, rows: Sequence[Mapping[str, Any]], places: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Also return `gold`. The column `golds` has the index of the gold response of each pair within its row."""
        golds = [at[np.array(row["golds"], dtype=np.int64)] for row, at in zip(rows, places, strict=True)]
        return {**super().index(rows, places), "gold": np.concatenate(golds)}

    def metrics(self, rewards: Tensor | None, inputs: Mapping[str, Tensor]) -> dict[str, Metric]:
        """Also return the log-prob of the gold response."""
        return {**super().metrics(rewards, inputs), "logps/gold": Metric(inputs["policy_gold_logps"])}


TRIPLES = Triples()
