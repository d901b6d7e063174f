"""The reference's scores of evaluation rows, kept in memory: a frozen reference says the same at every evaluation."""

from collections.abc import Callable, Hashable

from torch import Tensor

from hf_prefopt.data.batch import PreferenceBatch, ResponseScores


class RememberedScores:
    """Token log-probs of the batches of evaluation data sets, on the CPU: four bytes a scored token.

    A batch is known again by its data set and its rows. Whoever changes the reference calls `forget`.
    """

    def __init__(self):
        self._token_logps: dict[Hashable, Tensor] = {}

    def forget(self) -> None:
        """Nothing is known any more."""
        self._token_logps.clear()

    def score(
        self, dataset: Hashable, batch: PreferenceBatch, score: Callable[[PreferenceBatch], ResponseScores]
    ) -> ResponseScores:
        """The reference's scores of a batch: remembered, or made by `score` and remembered.

        Args:
            dataset: tells data sets apart, such as a fingerprint; `None` is never remembered.
            batch: a batch of that data set.
            score: makes the scores of a batch that is new.
        """
        key = (dataset, *batch["rows"].tolist(), *batch["pair_in_row"].tolist())
        if key in self._token_logps:
            logps = self._token_logps[key].to(batch["targets"].device)
            return ResponseScores(logps, batch["response_index"], batch["response_lengths"])
        scores = score(batch)
        if dataset is not None and not scores.token_stats:
            self._token_logps[key] = scores.token_logps.cpu()
        return scores
