"""The reference's scores of evaluation rows, kept in memory, because they are the same in every evaluation."""

from collections.abc import Callable, Hashable

import torch
import xxhash
from torch import Tensor

from hf_prefopt.batch import PreferenceBatch, ResponseScores


class RememberedScores:
    """Token log-probs of the batches of evaluation data sets, on the CPU: four bytes a scored token.

    A batch is known again by its data set, its rows and its tokens: in data sets that were concatenated, several rows
    have one number. Whoever changes the reference calls `forget`.
    """

    def __init__(self):
        self._token_logps: dict[Hashable, Tensor] = {}

    def forget(self) -> None:
        """Drop all scores."""
        self._token_logps.clear()

    def score(
        self,
        dataset: Hashable,
        batch: PreferenceBatch,
        score: Callable[[PreferenceBatch], ResponseScores],
        any_rank: Callable[[bool], bool] = bool,
    ) -> ResponseScores:
        """The reference's scores of a batch: remembered, or made by `score` and remembered.

        Args:
            dataset: tells data sets apart, such as a fingerprint; `None` is never remembered.
            batch: a batch of that data set; one without examples only runs along with other ranks.
            score: makes the scores of a batch that is new.
            any_rank: from "it is new here" to "… on any rank", where ranks must run the reference together.
        """
        key = (dataset, *batch["rows"].tolist(), *batch["pair_in_row"].tolist(), _digest(batch))
        is_idle = not len(batch["rows"])
        if not any_rank(key not in self._token_logps and not is_idle):
            logps = torch.zeros(len(batch["targets"])) if is_idle else self._token_logps[key]
            return ResponseScores(logps.to(batch["targets"].device), batch["response_index"], batch["response_lengths"])
        scores = score(batch)
        if dataset is not None and not is_idle and not scores.token_stats:
            self._token_logps[key] = scores.token_logps.cpu()
        return scores


def _digest(batch: PreferenceBatch) -> int:
    """A hash of what is scored after what."""
    parts = (batch[name].cpu().contiguous().numpy() for name in ("input_ids", "scored_rows", "targets"))
    return xxhash.xxh3_128_intdigest(b"".join(part.tobytes() for part in parts))
