"""A reference whose token log-probs are cached on disk. They are computed once, and other runs can use them.

For a dataset, one pass before training computes the missing log-probs (`cache_fill`). For a stream, they are computed
when a batch arrives. The collator adds the cache key of each response to the batch. `cache_store` reads and writes the
files, and `cache_key` computes the keys.
"""

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from huggingface_hub.constants import HF_HOME
from torch import nn

from hf_prefopt.batch import PreferenceBatch, ResponseScores
from hf_prefopt.reference.cache_key import fingerprint
from hf_prefopt.reference.cache_store import LogProbStore
from hf_prefopt.reference.live import LiveReference

# This folder is next to the caches of models and datasets, so that runs with other output folders find it.
DEFAULT_FOLDER = os.path.join(HF_HOME, "hf_prefopt", "reference_log_probs")


class MissingLogProbs(LookupError):
    """Raised if log-probs are not in the cache, and the reference that would compute them has been freed."""


class CachedReference:
    """A live reference with a cache. It has the scoring methods of `LiveReference`.

    Args:
        live: the reference that computes missing log-probs.
        folder: the folder of all caches; each reference has a sub-folder named after its fingerprint.
        temperature: the temperature of the log-probs.
        autocast_dtype: the dtype of autocast; `None` without autocast.

    Attributes:
        live: the live reference; `None` once it is released.
        any_rank: a function that is called with True if log-probs are missing on this rank, and returns True if this
            rank must run the reference. With engines whose ranks must run it together, it returns True if log-probs are
            missing on any rank.
    """

    def __init__(
        self,
        live: LiveReference,
        folder: str | Path | None = None,
        temperature: float = 1.0,
        autocast_dtype: torch.dtype | None = None,
    ):
        self.live: LiveReference | None = live
        self.any_rank: Callable[[bool], bool] = bool
        self.description = f"{live.description}, its log-probs cached"
        self._folder = Path(folder or DEFAULT_FOLDER).expanduser()
        self._temperature, self._autocast_dtype = temperature, autocast_dtype

    @property
    def model(self) -> nn.Module | None:
        """The module that computes missing log-probs; `None` once the live reference is released."""
        return self.live.model if self.live else None

    def place(self, accelerator: Accelerator) -> None:
        """Place the live reference; see `LiveReference.place`."""
        if self.live:
            self.live.place(accelerator)

    @cached_property
    def store(self) -> LogProbStore:
        """The store of the log-probs.

        It is created on first use, because its folder is named after a hash of the weights, which must be final by
        then.
        """
        assert self.live is not None
        with self.live.switch():
            name = fingerprint(self.live.model, self._temperature, self._autocast_dtype)
        about = {
            "reference": self.live.description,
            "model": getattr(self.live.model.config, "_name_or_path", ""),
            "temperature": self._temperature,
            "autocast": str(self._autocast_dtype),
        }
        return LogProbStore(self._folder / name, about)

    def score(self, batch: PreferenceBatch, token_stats: tuple[str, ...] = ()) -> ResponseScores:
        """Return the reference's scores of a batch. If log-probs are missing, run the reference and store them.

        Args:
            token_stats: ignored, because token statistics are not cached. The configuration rejects losses that need
                them.

        Raises:
            MissingLogProbs: some log-probs are not cached, and the reference has been released.
        """
        keys = batch["response_keys"]
        if self.any_rank(bool(self.store.missing(keys).any())):
            return self.compute(batch)
        token_logps = torch.cat(self.store.get(keys)).to(batch["targets"].device, non_blocking=True)
        return ResponseScores(token_logps, batch["response_index"], batch["response_lengths"])

    def predictions(self, scores: ResponseScores) -> None:
        """Return `None`, because predictions over the vocabulary are not cached."""

    def compute(self, batch: PreferenceBatch) -> ResponseScores:
        """Run the reference on a batch, store the log-probs that were missing, and return the scores.

        Raises:
            MissingLogProbs: the reference has been released.
        """
        keys = batch["response_keys"]
        missing = self.store.missing(keys)
        if self.live is None:
            raise self.missing_error(int(missing.sum()), len(keys), f"the batch of rows {batch['rows'].tolist()}")
        scores = self.live.score(batch)
        parts = scores.token_logps.cpu().split(batch["response_lengths"].tolist())
        for key, logps, new in zip(keys, parts, missing, strict=True):
            if new:
                # A copy, because a view would keep the tensor of the whole batch in memory.
                self.store.put(key, logps.clone())
        return scores

    def release(self) -> None:
        """Free the live reference if this saves memory. From then on, log-probs come only from the cache."""
        if not self.store:
            raise RuntimeError("open the store before the weights are freed, because its name is their fingerprint")
        if self.live is not None and self.live.has_own_memory:
            self.live = None

    def missing_error(self, missing: int, responses: int, where: str) -> MissingLogProbs:
        """Return the error for log-probs that can no longer be computed."""
        return MissingLogProbs(
            f"{missing:,} of {responses:,} responses of {where} have no reference log-probs in {self.store.folder}, "
            "and the reference model has been freed: pass every dataset to the trainer at construction "
            "(train_dataset, eval_dataset), or set precompute_ref_log_probs=False"
        )
