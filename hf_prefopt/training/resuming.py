"""A Trainer whose checkpoints are whole or not there: what a loss keeps and a reference that moves are in them."""

import json
import logging
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_prefopt.objective.objective import Objective
from hf_prefopt.reference.moving import MovingReference
from hf_prefopt.reporting.finite import FiniteRun, ruined_weights
from hf_prefopt.training.checkpoints import is_complete, last_complete_checkpoint
from hf_prefopt.training.engines import keep_output_precision, release_from_evaluation

logger = logging.getLogger(__name__)

OBJECTIVE_STATE = "objective_state.json"
# What a command line, where everything is text, says of a checkpoint.
_SPOKEN = {"true": True, "last": True, "auto": True, "false": None, "none": None}


class ResumingTrainer(Trainer):
    """Resumes from the newest whole checkpoint to the same weights, bit for bit on one process.

    Attributes:
        criterion: the objective, whose state is saved.
    """

    criterion: Objective
    _moving: MovingReference | None
    _finite: FiniteRun

    def train(self, resume_from_checkpoint: str | bool | None = None, **arguments: Any):
        """As the Trainer's; with `resume_from_checkpoint=True` from the newest checkpoint that was written to its end.

        The command line says `true`, `last` or `auto` for that; `false` is as `None`.

        Raises:
            ValueError: the checkpoint is half of one, there is no whole one to resume from, or a stream gave no rows.
            FloatingPointError: a loss or, at a checkpoint and at the end, a weight is not finite.
        """
        newest = last_complete_checkpoint(self.args.output_dir)
        checkpoint = _SPOKEN.get(str(resume_from_checkpoint).lower(), resume_from_checkpoint)
        if checkpoint is True:
            if newest is None:
                raise ValueError(f"{self.args.output_dir} has no complete checkpoint to resume from: start without")
            checkpoint = newest
            logger.warning("resuming from %s", checkpoint)
        if checkpoint and not is_complete(checkpoint):
            cure = f"resume from {newest}" if newest else "start without resume_from_checkpoint"
            raise ValueError(f"{checkpoint} is no checkpoint that was written to its end: {cure}")
        keep_output_precision(self.accelerator)
        release_from_evaluation(self)
        output = super().train(checkpoint or None, **arguments)
        if isinstance(self.train_dataset, IterableDataset) and not self.state.global_step:
            raise ValueError("nothing was trained: the stream of the training data gave no row that can be used")
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's; one that is overwritten loses the sign of a whole checkpoint first.

        Raises:
            FloatingPointError: a loss or the weights are not finite: there is nothing worth saving.
        """
        self._finite.check(self.accelerator, ruined_weights(self.model))
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """As the Trainer's, the last of what all ranks write; the state of the first rank follows when it is there."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the Trainer's, with what losses keep across batches, and with a reference that moves."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self._moving:
            self._moving.save(output_dir)
        if self.criterion.state and self.args.should_save:
            Path(output_dir, OBJECTIVE_STATE).write_text(json.dumps(self.criterion.state_dict()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's, with what losses keep across batches, and with a reference that moves."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._moving and checkpoint is not None:
            self._moving.load(checkpoint)
        if checkpoint is None or not self.criterion.state:
            return
        saved = Path(checkpoint, OBJECTIVE_STATE)
        if saved.is_file():
            self.criterion.load_state_dict(json.loads(saved.read_text()))
        else:
            logger.warning("%s has no %s: %s starts afresh", checkpoint, saved.name, ", ".join(self.criterion.state))
