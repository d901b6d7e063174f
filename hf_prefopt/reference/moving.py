"""A reference that follows the policy (TR-DPO, arXiv 2404.09656): every τ optimizer steps, θ_ref ← α·θ + (1 − α)·θ_ref.

Here θ are the parameters of the policy, and θ_ref those of the reference. An update with α < 1 is the paper's soft
update, and an update with α = 1 its hard update. The frozen copies of the trained tensors (of the model, or only of the
adapter) are updated in place. For a LoRA adapter, these are the factors A and B, so a soft update mixes the factors and
not their product B·A. A hard update is not affected: it copies the policy.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from hf_prefopt.reference.live import FrozenTensors

logger = logging.getLogger(__name__)

FILE = "moving_reference.safetensors"


@dataclass
class MovingReference:
    """A reference whose frozen copies move toward the policy, and are saved in checkpoints.

    Every process updates its own copies with its own parameters, sharded or not.

    Attributes:
        copies: the frozen copies.
        share: α in (0, 1], the weight of the policy in an update.
        every: τ, the number of optimizer steps between updates.
    """

    copies: FrozenTensors
    share: float
    every: int

    @property
    def description(self) -> str:
        """A phrase that describes the reference, for logs and model cards."""
        return (
            f"a copy of the policy that is updated every {self.every} steps "
            f"({self.share} × policy + {1 - self.share:.3g} × copy)"
        )

    def follow(self, step: int) -> bool:
        """Update the reference if an update is due after this optimizer step. Return True if it was due."""
        is_due = step % self.every == 0
        if is_due:
            self.copies.move(self.share)
        return is_due

    def save(self, checkpoint: Path, saves: bool) -> None:
        """Write the full reference into a checkpoint, so that any number of ranks can resume with it.

        Call it on every rank. Sharded tensors are gathered one at a time, and kept in memory on the rank where `saves`
        is True.
        """
        tensors = {}
        for name, tensor in self.copies.gathered():
            if saves:
                tensors[name] = tensor.cpu().contiguous()
        if saves:
            checkpoint.mkdir(parents=True, exist_ok=True)
            save_file(tensors, checkpoint / FILE)

    def load(self, checkpoint: Path) -> None:
        """Load the reference of a checkpoint; under an engine that shards, each rank takes its shard of every tensor.

        Raises:
            ValueError: the saved tensors are not the ones that are trained now.
        """
        path = checkpoint / FILE
        if not path.is_file():
            logger.warning("%s has no %s: the reference starts from the policy as given", checkpoint, path.name)
            return
        with safe_open(path, framework="pt") as saved:
            differing = sorted(saved.keys() ^ self.copies.tensors.keys())
            if differing:
                raise ValueError(f"{path} and the model differ in {len(differing)} trained tensors ({differing[0]}, …)")
            self.copies.replace(saved.get_tensor)
