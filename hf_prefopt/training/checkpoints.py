"""Find the checkpoint from which a run resumes, and check that the run can continue exactly.

A process may be killed while it writes a checkpoint. `trainer_state.json` is written last, after all ranks have written
their files, so a checkpoint is complete if this file is valid.
"""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hf_prefopt.training.stream_shards import is_split_by_shards

logger = logging.getLogger(__name__)

# Key of a `BatchOfStep` in `TrainerState.stateful_callbacks`.
BATCH = "hf_prefopt_batch"
# For each engine, the glob pattern of the files with the optimizer's state, and the engine's name in error messages.
_OPTIMIZERS = {
    DistributedType.DEEPSPEED: ("global_step*", "DeepSpeed"),
    DistributedType.FSDP: ("optimizer*[0n]", "FSDP"),  # the folder optimizer_0 or the file optimizer.bin
    None: ("optimizer.pt", "one process or DDP"),
}
# Values of resume_from_checkpoint on a command line, where every value is text.
_WORDS = {"true": True, "last": True, "auto": True, "false": None, "none": None}


def is_complete(checkpoint: str | Path) -> bool:
    """Return True if the checkpoint is complete, that is, if writing it was not interrupted."""
    try:
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the complete checkpoint with the most steps; `None` if there is none. Use it to resume after a crash.

    Example:
        ```python
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))
        ```

    Args:
        output_dir: The output folder of the run.

    Raises:
        ValueError: a checkpoint with fewer steps was written later, so the checkpoints are from several runs.
    """
    steps = {folder: re.fullmatch(r"checkpoint-(\d+)", folder.name) for folder in Path(output_dir).glob("checkpoint-*")}
    complete = {int(found[1]): folder for folder, found in steps.items() if found and is_complete(folder)}
    if not complete:
        return None
    furthest = complete[max(complete)]
    latest = max(complete.values(), key=_written)
    if _written(latest) > _written(furthest):
        raise ValueError(
            f"{output_dir} has checkpoints of several runs: {latest.name} was written after {furthest.name}. Pass the "
            "checkpoint folder, resume_from_checkpoint=folder, and use a separate output_dir for each run"
        )
    return str(furthest)


def _written(checkpoint: Path) -> int:
    return (checkpoint / TRAINER_STATE_NAME).stat().st_mtime_ns


def checkpoint_to_resume(asked: str | bool | None, output_dir: str | Path) -> str | None:
    """Return the checkpoint folder that `resume_from_checkpoint` selects, or `None` to start from the beginning.

    Args:
        asked: A folder; `True` ("true", "last" or "auto" on a command line) for the last complete checkpoint;
            `None` or `False` ("none", "false") for no checkpoint.

    Raises:
        ValueError: there is no complete checkpoint, or the given checkpoint is incomplete.
    """
    checkpoint = _WORDS.get(str(asked).lower(), asked)
    if checkpoint is True:
        newest = last_complete_checkpoint(output_dir)
        if newest is None:
            raise ValueError(
                f"resume_from_checkpoint={asked}: output_dir={output_dir} has no complete checkpoint to resume from: "
                "correct it, or pass the folder of a checkpoint; for a first run, leave resume_from_checkpoint out"
            )
        checkpoint = newest
        logger.warning("resuming from %s", checkpoint)
    if not checkpoint:
        return None
    if not is_complete(checkpoint):
        newest = last_complete_checkpoint(output_dir)
        cure = f"pass resume_from_checkpoint={newest}" if newest else "pass the folder of a complete checkpoint"
        fault = "not a complete checkpoint, because it was interrupted while it was written"
        if not Path(checkpoint).is_dir():
            fault = "there is no such folder"
        raise ValueError(f"resume_from_checkpoint={checkpoint}: {fault}: {cure}")
    return str(checkpoint)


@dataclass(frozen=True)
class BatchOfStep:
    """The three factors of the number of rows in an optimizer step.

    Attributes:
        rows: Number of rows in a micro-batch of one rank.
        accumulation: Number of gradient accumulation steps.
        ranks: Number of ranks.
    """

    rows: int
    accumulation: int
    ranks: int

    def __str__(self) -> str:
        rows, accumulation, ranks = self.rows, self.accumulation, self.ranks
        return (
            f"{rows * accumulation * ranks} rows per step (per_device_train_batch_size={rows} × "
            f"gradient_accumulation_steps={accumulation} × {ranks} {'rank' if ranks == 1 else 'ranks'})"
        )


def begun_at(checkpoint: str | None) -> int:
    """Return the number of steps that a checkpoint's run had made; 0 if `checkpoint` is `None`."""
    return 0 if checkpoint is None else _read_state(checkpoint)["global_step"]


def check_resumable(
    checkpoint: str, accelerator: Accelerator, batch: BatchOfStep, args: TrainingArguments, rows: Any = None
) -> None:
    """Raise `ValueError` if a run cannot continue exactly from this checkpoint.

    If the checkpoint has no optimizer state (`save_only_model`), log a warning that the optimizer and the learning-rate
    schedule restart.

    Args:
        batch: The number of rows in a step of the run that resumes, as its three factors.
        rows: The training data.
    """
    _check_optimizer(Path(checkpoint), accelerator)
    saved = _read_state(checkpoint).get("stateful_callbacks", {}).get(BATCH)
    if saved is None or args.ignore_data_skip or args.auto_find_batch_size:
        return
    before = BatchOfStep(**saved)
    if before.rows * before.accumulation * before.ranks != batch.rows * batch.accumulation * batch.ranks:
        raise ValueError(
            f"{checkpoint} is from a run with {before}, but this run has {batch}, so rows and learning rates of the "
            "steps would not match: use the same number of rows per step, or set ignore_data_skip=True to continue at "
            "the beginning of an epoch"
        )
    if before.ranks != batch.ranks and any(is_split_by_shards(rows, args, one.ranks) for one in (before, batch)):
        raise ValueError(
            f"{checkpoint} was written by {before.ranks} ranks, and {batch.ranks} ranks resume: each rank reads its "
            "own shards of the stream, so rows would be repeated and left out. Use the same number of ranks, or set "
            "ignore_data_skip=True to continue at the beginning of an epoch"
        )
    if before.ranks != batch.ranks:
        logger.warning(
            "%s was written by %d ranks, and %d ranks resume: the rows of each step stay the same, but dropout uses "
            "different random numbers",
            checkpoint,
            before.ranks,
            batch.ranks,
        )


def _check_optimizer(checkpoint: Path, accelerator: Accelerator) -> None:
    engine = accelerator.distributed_type
    engine = engine if engine in _OPTIMIZERS else None
    there = {key: sorted(checkpoint.glob(pattern)) for key, (pattern, _) in _OPTIMIZERS.items()}
    written_by = next((key for key in _OPTIMIZERS if there[key]), engine)
    weights = "start a new run from its weights (pass the folder as model)"
    if written_by != engine:
        raise ValueError(
            f"{checkpoint} was written under {_OPTIMIZERS[written_by][1]}, but this run is under "
            f"{_OPTIMIZERS[engine][1]}, which cannot read its optimizer state: resume under the same engine, or "
            f"{weights}"
        )
    is_adapter = any(checkpoint.rglob("adapter_config.json"))
    if not there[engine] and engine is not None and not (is_adapter and engine == DistributedType.FSDP):
        raise ValueError(
            f"{checkpoint} has only weights (save_only_model=True), from which {_OPTIMIZERS[engine][1]} cannot resume: "
            f"{weights}"
        )
    if not there[engine]:
        logger.warning(
            "%s has only weights (save_only_model=True): the optimizer and the learning-rate schedule restart",
            checkpoint,
        )
    if engine == DistributedType.DEEPSPEED:
        _check_ranks_of_zero(checkpoint, accelerator, weights)


def _check_ranks_of_zero(checkpoint: Path, accelerator: Accelerator, weights: str) -> None:
    files = list(checkpoint.glob("global_step*/*zero_pp_rank_*_mp_rank_00_optim_states.pt"))
    loads_universal = accelerator.state.deepspeed_plugin.deepspeed_config.get("checkpoint", {}).get("load_universal")
    if files and len(files) != accelerator.num_processes and not loads_universal:
        raise ValueError(
            f"{checkpoint} was written by {len(files)} ranks, but this run has {accelerator.num_processes}, and "
            "DeepSpeed needs the same number to resume: start the same number of ranks, convert the checkpoint "
            f"(deepspeed.checkpoint.ds_to_universal), or {weights}"
        )


def _read_state(checkpoint: str | Path) -> dict:
    return json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())


def begin_checkpoint(folder: Path) -> None:
    """Mark a checkpoint as incomplete before it is overwritten."""
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
