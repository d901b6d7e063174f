"""Check whether a checkpoint can be resumed, and store our own state in checkpoints.

A process may be killed while it writes a checkpoint. `trainer_state.json` is written last, after all ranks have written
their files, so a checkpoint is complete if this file is valid. The file also contains the state of the losses.
"""

import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hf_prefopt.objective.objective import Objective
from hf_prefopt.reporting.start_summary import loss_texts
from hf_prefopt.training.resumed_run import RUN
from hf_prefopt.training.stream_shards import is_split_by_shards

logger = logging.getLogger(__name__)

# Keys of our entries in `TrainerState.stateful_callbacks`: the names of the losses, their state, log-probs that
# identify the reference, and the composition of a step's batch.
OBJECTIVE, LOSSES = "hf_prefopt_objective", "hf_prefopt_losses"
REFERENCE, BATCH = "hf_prefopt_reference", "hf_prefopt_batch"
# For each engine, a pattern for the files of the optimizer's state, and the engine's name in error messages.
_OPTIMIZERS = {
    DistributedType.DEEPSPEED: ("global_step*", "DeepSpeed"),
    DistributedType.FSDP: ("optimizer*[0n]", "FSDP"),  # optimizer_0, a folder, or optimizer.bin
    None: ("optimizer.pt", "one process or DDP"),
}
# File in which earlier versions stored the state of the losses.
_OLD_STATE = "objective_state.json"
# Values of resume_from_checkpoint on a command line, where every value is text.
_WORDS = {"true": True, "last": True, "auto": True, "false": None, "none": None}


def is_complete(checkpoint: str | Path) -> bool:
    """Return True if the checkpoint is complete, not interrupted while it was written."""
    try:
        json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return True


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Return the complete checkpoint with the most steps, or `None`. Use it to resume after a crash.

    Example:
        ```python
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))
        ```

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
        ValueError: there is no complete checkpoint; the given checkpoint is incomplete, or an older version wrote it.
    """
    checkpoint = _WORDS.get(str(asked).lower(), asked)
    if checkpoint is True:
        newest = last_complete_checkpoint(output_dir)
        if newest is None:
            raise ValueError(
                f"resume_from_checkpoint={asked}: {output_dir} has no complete checkpoint to resume from: correct the "
                "folder, or, for a first run, leave it out"
            )
        checkpoint = newest
        logger.warning("resuming from %s", checkpoint)
    if not checkpoint:
        return None
    if not is_complete(checkpoint):
        newest = last_complete_checkpoint(output_dir)
        cure = f"pass resume_from_checkpoint={newest}" if newest else "pass the folder of a complete checkpoint"
        fault = "not a complete checkpoint, its writing was interrupted"
        if not Path(checkpoint).is_dir():
            fault = "there is no such folder"
        raise ValueError(f"resume_from_checkpoint={checkpoint}: {fault}: {cure}")
    if Path(checkpoint, _OLD_STATE).is_file():
        raise ValueError(
            f"{checkpoint} is from an older version of hf_prefopt, which kept the state of the losses in {_OLD_STATE}, "
            "and cannot be resumed by this one: resume with the older version"
        )
    return str(checkpoint)


@dataclass(frozen=True)
class BatchOfStep:
    """Composition of an optimizer step's batch: rows per rank and micro-batch, accumulation steps, and ranks."""

    rows: int
    accumulation: int
    ranks: int

    def __str__(self) -> str:
        rows, accumulation, ranks = self.rows, self.accumulation, self.ranks
        return (
            f"{rows * accumulation * ranks} rows per step (per_device_train_batch_size={rows} × "
            f"gradient_accumulation_steps={accumulation} × {ranks} {'rank' if ranks == 1 else 'ranks'})"
        )


def keep_batch(state: TrainerState, batch: BatchOfStep) -> None:
    """Store the batch's composition in the state that the Trainer saves in a checkpoint."""
    state.stateful_callbacks[BATCH] = asdict(batch)


def begun_at(checkpoint: str | None) -> int:
    """Return the step of a checkpoint; 0 for `None`."""
    return 0 if checkpoint is None else _read_state(checkpoint)["global_step"]


def check_resumable(
    checkpoint: str, accelerator: Accelerator, batch: BatchOfStep, args: TrainingArguments, rows: Any = None
) -> None:
    """Raise `ValueError` if a run cannot continue exactly from this checkpoint.

    If the checkpoint has no optimizer state (`save_only_model`), log a warning: optimizer and learning rate restart.

    Args:
        batch: Composition of a step's batch in the run that resumes.
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
    """Mark a checkpoint that will be overwritten as incomplete, and remove the state file of older versions."""
    for name in (TRAINER_STATE_NAME, _OLD_STATE):
        (folder / name).unlink(missing_ok=True)


def keep_losses(state: TrainerState, objective: Objective) -> None:
    """Store the losses' names and state in the state that the Trainer saves in a checkpoint."""
    state.stateful_callbacks[OBJECTIVE] = {"losses": loss_texts(objective)}
    if objective.state:
        state.stateful_callbacks[LOSSES] = objective.state_dict()


def restore_losses(state: TrainerState, objective: Objective) -> None:
    """Restore the losses' state from a checkpoint.

    Log a warning if the checkpoint's run had different losses, or has no state for a loss (the loss then starts with
    its initial state).
    """
    objective.reset_state()
    # The Trainer treats all remaining entries as states of callbacks.
    state.stateful_callbacks.pop(BATCH, None)
    state.stateful_callbacks.pop(RUN, None)
    saved = state.stateful_callbacks.pop(LOSSES, {})
    before, now = state.stateful_callbacks.pop(OBJECTIVE, {}).get("losses"), loss_texts(objective)
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


def keep_reference(state: TrainerState, made_up_logps: list[float] | None) -> None:
    """Store log-probs that identify the reference in the state that the Trainer saves in a checkpoint."""
    if made_up_logps is not None:
        state.stateful_callbacks[REFERENCE] = {"made_up_logps": made_up_logps}


def kept_reference(state: TrainerState) -> list[float] | None:
    """Remove the reference's log-probs from a checkpoint's state and return them; `None` if there are none."""
    return state.stateful_callbacks.pop(REFERENCE, {}).get("made_up_logps")


def load_adapters(model: PeftModel, checkpoint: str | Path) -> None:
    """Load all adapters of a checkpoint without changing which adapters are active and which parameters are trained.

    PEFT saves the adapter named "default" in the checkpoint folder, and each other adapter in a subfolder with its
    name. The Trainer itself would load only one adapter and activate it.

    Raises:
        ValueError: the adapter names of the checkpoint and the model differ.
    """
    folders = {name: Path(checkpoint) if name == "default" else Path(checkpoint, name) for name in model.peft_config}
    saved = saved_adapters(checkpoint)
    if saved != folders.keys():
        raise ValueError(
            f"{checkpoint} has the adapters {', '.join(sorted(saved)) or '(none)'}, but the model has "
            f"{', '.join(sorted(folders))}: add adapters with the same names to the model"
        )
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, folder in folders.items():
        model.load_adapter(str(folder), name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains[name])


def saved_adapters(checkpoint: str | Path) -> set[str]:
    """Return the names of the adapters in a checkpoint."""
    files = (*Path(checkpoint).glob("adapter_config.json"), *Path(checkpoint).glob("*/adapter_config.json"))
    return {file.parent.name if file.parent != Path(checkpoint) else "default" for file in files}


def refuse_adapter_alone(checkpoint: str | Path) -> None:
    """Raise `ValueError` if the checkpoint contains adapters, because the policy has none."""
    if saved := saved_adapters(checkpoint):
        raise ValueError(
            f"{checkpoint} has the adapters {', '.join(sorted(saved))}, but the policy of this run has no adapter: "
            "pass the peft_config of the run that wrote the checkpoint"
        )
