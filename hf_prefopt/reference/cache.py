"""A reference that is looked up: its token log-probs on disk, each computed once and then shared by runs.

Before training one pass computes what is missing (`cache_fill`); what a data stream brings is computed when it is first
met. A batch's log-probs are found by the keys that its collator gave it. The files are `cache_store`'s, the keys
`cache_key`'s.
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

# Beside the caches of models and data sets, so that runs with other output folders find it.
DEFAULT_FOLDER = os.path.join(HF_HOME, "hf_prefopt", "reference_log_probs")


class MissingLogProbs(LookupError):
    """Log-probs that are not cached, and nothing is there to compute them."""


class CachedReference:
    """A live reference behind its cache; scored like it.

    Args:
        live: computes what is missing.
        folder: of all caches; this reference's is the sub-folder named after its fingerprint.
        temperature: the one that log-probs are taken at.
        autocast_dtype: what autocast makes of the model, if anything.

    Attributes:
        live: as given; `None` once it is released.
        any_rank: from "something is missing here" to "… on any rank", where ranks must run the reference together.
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
        """The module that is called for what is missing; `None` once it is released."""
        return self.live.model if self.live else None

    def place(self, accelerator: Accelerator) -> None:
        """As the live reference's."""
        if self.live:
            self.live.place(accelerator)

    @cached_property
    def store(self) -> LogProbStore:
        """Where the log-probs are. Made when it is first needed: the weights are hashed then, as they act by then."""
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
        """The reference's scores of a batch: looked up, or computed and kept.

        Args:
            token_stats: as the live reference's; none of them is cached, and the configuration refuses losses that ask.

        Raises:
            MissingLogProbs: some are not cached, and the reference has been released.
        """
        keys = batch["response_keys"]
        if self.any_rank(self.store.missing(keys).any()):
            return self.compute(batch)
        token_logps = torch.cat(self.store.get(keys)).to(batch["targets"].device, non_blocking=True)
        return ResponseScores(token_logps, batch["response_index"], batch["response_lengths"])

    def predictions(self, scores: ResponseScores) -> None:
        """As the live reference's; there are none of whole vocabularies."""

    def compute(self, batch: PreferenceBatch) -> ResponseScores:
        """Run the reference on a batch and keep what was not known.

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
                # A copy: a view would keep the whole batch's memory.
                self.store.put(key, logps.clone())
        return scores

    def release(self) -> None:
        """Free a reference that has memory of its own: what is cached is then all there will be."""
        if not self.store:
            raise RuntimeError("the store is made before the weights are freed, because its name is their fingerprint")
        if self.live is not None and self.live.has_own_memory:
            self.live = None

    def missing_error(self, missing: int, responses: int, where: str) -> MissingLogProbs:
        """What to say where log-probs cannot be had."""
        return MissingLogProbs(
            f"{missing:,} of {responses:,} responses of {where} have no reference log-probs in {self.store.folder}, "
            "and the reference model has been let go: give every data set to the trainer at construction "
            "(train_dataset, eval_dataset), or set precompute_ref_log_probs=False"
        )
