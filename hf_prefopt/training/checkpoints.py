"""Which checkpoints of a run are whole: a process may be killed while it writes one.

The Trainer writes a checkpoint's `trainer_state.json` last, when everything else of all ranks is there (the trainer
sees to that), and without it starts afresh from the weights without a word. So that file decides.
"""

import json
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME


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
