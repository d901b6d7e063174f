"""A reference that follows the policy (TR-DPO, arXiv 2404.09656): every τ optimiser steps, θ_ref ← α·θ + (1 − α)·θ_ref.

α < 1 is the paper's soft update, α = 1 its hard one. What moves are the frozen copies of the tensors that train, each
in place and by itself: those of the model, or of the adapter alone. For an adapter the mixed tensors are its factors A
and B, so that a soft update is of those and not of their product; a hard one is the policy itself in either case.
"""

import logging
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_prefopt.reference.shards import is_sharded

logger = logging.getLogger(__name__)

FILE = "moving_reference.safetensors"
SHARD = "moving_reference-{}-of-{}.safetensors"


class MovingReference(TrainerCallback):
    """Moves the reference of a trainer, and carries it over checkpoints; its settings are the trainer's.

    Every process moves its own copies by its own parameters: the same on all of them, or their shards.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    @property
    def description(self) -> str:
        """A phrase for logs and model cards."""
        args = self.trainer.args
        return (
            f"a copy of the policy that follows it: every {args.ref_model_sync_steps} steps, "
            f"{args.ref_model_mixup_alpha} of the policy and {1 - args.ref_model_mixup_alpha:.3g} of itself"
        )

    def on_step_end(self, args, state, control, **_):
        """After the optimiser's step, before anything is evaluated or saved."""
        if state.global_step % args.ref_model_sync_steps == 0:
            self.sync()

    def sync(self) -> None:
        """One update. What evaluations remember of the reference is forgotten."""
        self.trainer.reference.copies.move(self.trainer.args.ref_model_mixup_alpha)
        self.trainer.forget_reference_scores()

    def save(self, checkpoint: str) -> None:
        """Write the reference beside the optimiser's state; where an engine shards it, each rank its shards."""
        copies = self.trainer.reference.copies
        if self.trainer.args.should_save or is_sharded(copies.model):
            tensors = {name: tensor.contiguous() for name, tensor in copies.tensors.items()}
            save_file(tensors, self._file(checkpoint))

    def _file(self, checkpoint: str) -> Path:
        args = self.trainer.args
        sharded = is_sharded(self.trainer.reference.copies.model)
        return Path(checkpoint, SHARD.format(args.process_index, args.world_size) if sharded else FILE)

    def load(self, checkpoint: str) -> None:
        """Take over the reference of a checkpoint.

        Raises:
            ValueError: it holds other tensors than those that train now.
        """
        path = self._file(checkpoint)
        if not path.is_file():
            logger.warning("%s has no %s: the reference starts from the policy as given", checkpoint, path.name)
            return
        saved, copies = load_file(path), self.trainer.reference.copies
        differing = sorted(saved.keys() ^ copies.tensors.keys())
        if differing:
            raise ValueError(f"{path} and the model differ in {len(differing)} trained tensors ({differing[0]}, …)")
        # Whole copies that were made before an engine sharded the model give way to shards.
        copies.tensors = {name: saved[name].to(tensor.device, tensor.dtype) for name, tensor in copies.tensors.items()}
