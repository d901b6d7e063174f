"""A reference that follows the policy (TR-DPO, arXiv 2404.09656): every τ optimiser steps, θ_ref ← α·θ + (1 − α)·θ_ref.

α < 1 is the paper's soft update, α = 1 its hard one. What moves are the frozen copies of the tensors that train, each
in place and by itself: those of the model, or of the adapter alone. For an adapter the mixed tensors are its factors A
and B, so that a soft update is of those and not of their product; a hard one is the policy itself in either case.
"""

import logging
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

FILE = "moving_reference.safetensors"


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
        """Write the reference beside the optimiser's state, whole, so that any number of ranks can go on with it.

        Called on every rank. Where an engine shards it, it is gathered parameter by parameter into the CPU's memory of
        the rank that writes.
        """
        saves, tensors = self.trainer.args.should_save, {}
        for name, tensor in self.trainer.reference.copies.whole():
            if saves:
                tensors[name] = tensor.cpu().contiguous()
        if saves:
            save_file(tensors, Path(checkpoint, FILE))

    def load(self, checkpoint: str) -> None:
        """Take over the reference of a checkpoint; a rank of an engine that shards it, its part of every tensor.

        Raises:
            ValueError: it holds other tensors than those that train now.
        """
        path = Path(checkpoint, FILE)
        if not path.is_file():
            logger.warning("%s has no %s: the reference starts from the policy as given", checkpoint, path.name)
            return
        copies = self.trainer.reference.copies
        with safe_open(path, framework="pt") as saved:
            differing = sorted(saved.keys() ^ copies.tensors.keys())
            if differing:
                raise ValueError(f"{path} and the model differ in {len(differing)} trained tensors ({differing[0]}, …)")
            copies.replace(saved.get_tensor)
