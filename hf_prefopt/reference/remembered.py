"""The reference's scores of evaluation rows, kept in memory, because they are the same in every evaluation."""

from collections.abc import Callable, Hashable

import torch
import xxhash
from torch import Tensor

from hf_prefopt.batch import PreferenceBatch, ResponseScores


class RememberedScores:
    """A memory of the reference's token log-probs for batches of evaluation datasets.

    The log-probs are on the CPU, and take four bytes per scored token. A batch is identified by its dataset, its row
    numbers and its tokens. Row numbers are not enough, because several rows of concatenated datasets can have the same
    number. Call `forget` after changing the reference.
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
        """Return the reference's scores of a batch. If they are not in memory, compute them by `score` and store them.

        Args:
            dataset: an identifier of the dataset, such as a fingerprint; with `None`, nothing is stored.
            batch: a batch of that dataset. It may have no examples: this rank then only runs the reference together
                with the other ranks.
            score: function that computes the scores of a batch with the reference.
            any_rank: function that is called with True if the batch is new on this rank, and returns True if this rank
                must run the reference. With engines whose ranks must run it together, it returns True if the batch is
                new on any rank.
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
    """Return a hash of the batch's tokens, its targets, and its scored positions."""
    parts = (batch[name].cpu().contiguous().numpy() for name in ("input_ids", "scored_rows", "targets"))
    return xxhash.xxh3_128_intdigest(b"".join(part.tobytes() for part in parts))
