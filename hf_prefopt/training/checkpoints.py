"""Which checkpoints can be resumed, and what ours contain in addition to the Trainer's.

A process may be killed while it writes a checkpoint. The Trainer writes `trainer_state.json` last, when everything
else of all ranks is there (the trainer sees to that), so this file decides. What the losses keep is in it.
"""

import json
import logging
import re
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_prefopt.objective.objective import Objective

logger = logging.getLogger(__name__)

# The keys of what we keep, next to the states of the callbacks.
LOSSES, REFERENCE = "hf_prefopt_losses", "hf_prefopt_reference"
# Where earlier versions kept it.
_OLD_STATE = "objective_state.json"
# What resume_from_checkpoint may be on a command line, where everything is text.
_WORDS = {"true": True, "last": True, "auto": True, "false": None, "none": None}


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest checkpoint of a run that was written to its end, or `None`: what to resume from after a crash.

    Example:
        ```python
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))
        ```
    """
    steps = {folder: re.fullmatch(r"checkpoint-(\d+)", folder.name) for folder in Path(output_dir).glob("checkpoint-*")}
    complete = {int(found[1]): str(folder) for folder, found in steps.items() if found and is_complete(folder)}
    return complete[max(complete)] if complete else None


def checkpoint_to_resume(asked: str | bool | None, output_dir: str | Path) -> str | None:
    """The folder that `resume_from_checkpoint` asks for; `None`: start without.

    Args:
        asked: a folder; `True` ("true", "last" or "auto" on a command line) for the newest complete checkpoint;
            `None` or `False` ("none", "false") for none.

    Raises:
        ValueError: there is no complete checkpoint, the one asked for is incomplete, or an older version wrote it.
    """
    newest = last_complete_checkpoint(output_dir)
    checkpoint = _WORDS.get(str(asked).lower(), asked)
    if checkpoint is True:
        if newest is None:
            raise ValueError(f"{output_dir} has no complete checkpoint to resume from: start without")
        checkpoint = newest
        logger.warning("resuming from %s", checkpoint)
    if not checkpoint:
        return None
    if not is_complete(checkpoint):
        cure = f"resume from {newest}" if newest else "start without resume_from_checkpoint"
        raise ValueError(f"{checkpoint} is not a complete checkpoint, its writing was interrupted: {cure}")
    if Path(checkpoint, _OLD_STATE).is_file():
        raise ValueError(
            f"{checkpoint} is from an older version of hf_prefopt, which kept the state of the losses in {_OLD_STATE}, "
            "and cannot be resumed: resume with the older version, or start without resume_from_checkpoint"
        )
    return str(checkpoint)


def begin_checkpoint(folder: Path) -> None:
    """Make a checkpoint that will be overwritten incomplete, and remove what an older version kept in it."""
    for name in (TRAINER_STATE_NAME, _OLD_STATE):
        (folder / name).unlink(missing_ok=True)


def keep_losses(state: TrainerState, objective: Objective) -> None:
    """Put what the losses keep across batches into the state that the Trainer saves with a checkpoint."""
    if objective.state:
        state.stateful_callbacks[LOSSES] = objective.state_dict()


def restore_losses(state: TrainerState, objective: Objective) -> None:
    """Take it over from the state of a checkpoint; losses whose state is not there start afresh, with a warning."""
    objective.reset_state()
    # The Trainer takes what is left for the states of callbacks.
    saved = state.stateful_callbacks.pop(LOSSES, {})
    missing = objective.state.keys() - saved.keys()
    if missing:
        logger.warning("the checkpoint has no state of %s, which starts afresh", ", ".join(sorted(missing)))
    objective.load_state_dict(saved)


def keep_reference(state: TrainerState, made_up_logps: list[float] | None) -> None:
    """Put what tells a reference from another into the state that the Trainer saves with a checkpoint."""
    if made_up_logps is not None:
        state.stateful_callbacks[REFERENCE] = {"made_up_logps": made_up_logps}


def kept_reference(state: TrainerState) -> list[float] | None:
    """Take it out of the state of a checkpoint; `None` where there is nothing."""
    return state.stateful_callbacks.pop(REFERENCE, {}).get("made_up_logps")
