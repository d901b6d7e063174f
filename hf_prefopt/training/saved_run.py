"""Save in each checkpoint the state that a run needs to continue exactly, and restore it.

This package's entries in `TrainerState.stateful_callbacks` become part of `trainer_state.json`. They are the names and
the state of the losses, log-probs that identify the reference, the number of rows in a step (`BatchOfStep`), and the
facts of the run (`RunFacts`). A moving reference has its own file in the checkpoint.
"""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import TrainerState

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.objective.objective import Objective
from hf_prefopt.reporting.start_summary import loss_texts
from hf_prefopt.training.checkpoints import (
    BATCH,
    BatchOfStep,
    begin_checkpoint,
    check_resumable,
    checkpoint_to_resume,
)
from hf_prefopt.training.resumed_run import RUN, check_facts, entries_of, facts_of, keep_facts
from hf_prefopt.training.scorer import Scorer

logger = logging.getLogger(__name__)

# Keys of three entries: the names of the losses, their state, and log-probs that identify the reference.
OBJECTIVE, LOSSES, REFERENCE = "hf_prefopt_objective", "hf_prefopt_losses", "hf_prefopt_reference"


class SavedRun:
    """An object that saves the state that the Trainer itself does not save, and resumes runs from checkpoints.

    Args:
        args: Settings of the run.
        scorer: The scorer, which has the losses and the reference.
    """

    def __init__(self, args: PreferenceConfig, scorer: Scorer):
        self._args, self._scorer = args, scorer

    def to_resume(self, asked: str | bool | None, accelerator: Accelerator, dataset: Any, rows: int) -> str | None:
        """Return the checkpoint that `resume_from_checkpoint` selects; `None` if the run starts from the beginning.

        Args:
            dataset: The prepared training data.
            rows: Number of rows of a micro-batch on one rank.

        Raises:
            ValueError: the checkpoint is missing, incomplete, or incompatible with this run.
        """
        args = self._args
        checkpoint = checkpoint_to_resume(asked, args.output_dir)
        if checkpoint is not None:
            check_resumable(checkpoint, accelerator, self._batch_of_step(rows), args, dataset)
            check_facts(checkpoint, facts_of(args, dataset), not args.ignore_data_skip)
        return checkpoint

    def save(self, checkpoint: Path, state: TrainerState, dataset: Any, rows: int) -> None:
        """Begin a checkpoint: mark it as incomplete, save a moving reference, and add entries to the state.

        Call it on every rank. The arguments `dataset` and `rows` have the same meaning as in `to_resume`.
        """
        saves = self._args.should_save
        if saves:
            begin_checkpoint(checkpoint)
        self._scorer.save(checkpoint, saves)
        keep_losses(state, self._scorer.objective)
        if self._scorer.made_up_logps is not None:
            entries_of(state)[REFERENCE] = {"made_up_logps": self._scorer.made_up_logps}
        entries_of(state)[BATCH] = asdict(self._batch_of_step(rows))
        keep_facts(state, facts_of(self._args, dataset))

    def restore(self, state: TrainerState) -> None:
        """Remove this package's entries from a checkpoint's state, and restore the losses; see `restore_losses`."""
        restore_losses(state, self._scorer.objective)
        self._scorer.resumed_logps = entries_of(state).pop(REFERENCE, {}).get("made_up_logps")

    def _batch_of_step(self, rows: int) -> BatchOfStep:
        return BatchOfStep(rows, self._args.gradient_accumulation_steps, self._args.world_size)


def keep_losses(state: TrainerState, objective: Objective) -> None:
    """Store the losses' names and state in the state that the Trainer saves in a checkpoint."""
    entries_of(state)[OBJECTIVE] = {"losses": loss_texts(objective)}
    if objective.state:
        entries_of(state)[LOSSES] = objective.state_dict()


def restore_losses(state: TrainerState, objective: Objective) -> None:
    """Restore the losses' state from a checkpoint.

    Log a warning if the checkpoint's run had different losses, or if the checkpoint has no state for a loss. In the
    second case, this loss starts with its initial state.
    """
    objective.reset_state()
    # The Trainer treats all remaining entries as states of callbacks.
    entries = entries_of(state)
    entries.pop(BATCH, None)
    entries.pop(RUN, None)
    saved = entries.pop(LOSSES, {})
    before, now = entries.pop(OBJECTIVE, {}).get("losses"), loss_texts(objective)
    if before not in (None, now):
        logger.warning(
            "the checkpoint's run had other losses (%s), and the optimizer state is from these losses; training "
            "continues with (%s). To start with a new optimizer, start a new run from the checkpoint's weights",
            "; ".join(before),
            "; ".join(now),
        )
    missing = objective.state.keys() - saved.keys()
    if missing:
        logger.warning("the checkpoint has no state for %s: using the initial state", ", ".join(sorted(missing)))
    objective.load_state_dict(saved)
