"""Which checkpoints can be resumed, and what ours contain in addition to the Trainer's.

A process may be killed while it writes a checkpoint. The Trainer writes `trainer_state.json` last, when everything
else of all ranks is there (the trainer sees to that), so this file decides. What the losses keep is in it.
"""

import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import PeftModel
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hf_prefopt.objective.objective import Objective
from hf_prefopt.reporting.start_summary import loss_texts
from hf_prefopt.training.resumed_run import RUN

logger = logging.getLogger(__name__)

# The keys of what we keep next to the states of the callbacks: which losses there are, their state, what tells the
# reference from another, and what the batch of a step is made of.
OBJECTIVE, LOSSES = "hf_prefopt_objective", "hf_prefopt_losses"
REFERENCE, BATCH = "hf_prefopt_reference", "hf_prefopt_batch"
# What each engine keeps of the optimizer, and what it is called in errors.
_OPTIMIZERS = {
    DistributedType.DEEPSPEED: ("global_step*", "DeepSpeed"),
    DistributedType.FSDP: ("optimizer*[0n]", "FSDP"),  # optimizer_0, a folder, or optimizer.bin
    None: ("optimizer.pt", "one process or DDP"),
}
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
    """The checkpoint of most steps that was written to its end, or `None`: what to resume from after a crash.

    Example:
        ```python
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))
        ```

    Raises:
        ValueError: one of fewer steps was written after it, so they are of several runs.
    """
    steps = {folder: re.fullmatch(r"checkpoint-(\d+)", folder.name) for folder in Path(output_dir).glob("checkpoint-*")}
    complete = {int(found[1]): folder for folder, found in steps.items() if found and is_complete(folder)}
    if not complete:
        return None
    furthest = complete[max(complete)]
    latest = max(complete.values(), key=_written)
    if _written(latest) > _written(furthest):
        raise ValueError(
            f"{output_dir} has checkpoints of several runs: {latest.name} was written after {furthest.name}. Name the "
            "one to resume from, resume_from_checkpoint=folder, and give each run an output_dir of its own"
        )
    return str(furthest)


def _written(checkpoint: Path) -> int:
    return (checkpoint / TRAINER_STATE_NAME).stat().st_mtime_ns


def checkpoint_to_resume(asked: str | bool | None, output_dir: str | Path) -> str | None:
    """The folder that `resume_from_checkpoint` asks for; `None`: start without.

    Args:
        asked: a folder; `True` ("true", "last" or "auto" on a command line) for the last complete checkpoint;
            `None` or `False` ("none", "false") for none.

    Raises:
        ValueError: there is no complete checkpoint, the one asked for is incomplete, or an older version wrote it.
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
    """What makes up the rows of an optimizer step: rows a rank takes at a time, how often, and the number of ranks."""

    rows: int
    accumulation: int
    ranks: int

    def __str__(self) -> str:
        rows, accumulation, ranks = self.rows, self.accumulation, self.ranks
        return (
            f"{rows * accumulation * ranks} rows a step (per_device_train_batch_size={rows} × "
            f"gradient_accumulation_steps={accumulation} × {ranks} {'rank' if ranks == 1 else 'ranks'})"
        )


def keep_batch(state: TrainerState, batch: BatchOfStep) -> None:
    """Put it into the state that the Trainer saves with a checkpoint."""
    state.stateful_callbacks[BATCH] = asdict(batch)


def begun_at(checkpoint: str | None) -> int:
    """The step of a checkpoint; 0 for none."""
    return 0 if checkpoint is None else _read_state(checkpoint)["global_step"]


def check_resumable(checkpoint: str, accelerator: Accelerator, batch: BatchOfStep, args: TrainingArguments) -> None:
    """Raise `ValueError` if a run resumed from this checkpoint would not go on where it ended.

    Without the optimizer's state (`save_only_model`) the optimizer and the learning rate start afresh, with a warning.

    Args:
        batch: of the run that is to resume.
    """
    _check_optimizer(Path(checkpoint), accelerator)
    saved = _read_state(checkpoint).get("stateful_callbacks", {}).get(BATCH)
    if saved is None or args.ignore_data_skip or args.auto_find_batch_size:
        return
    before = BatchOfStep(**saved)
    if before.rows * before.accumulation * before.ranks != batch.rows * batch.accumulation * batch.ranks:
        raise ValueError(
            f"{checkpoint} is of a run with {before}, and this run has {batch}, so its steps would be other rows and "
            "others' learning rates: make the rows a step the same, or set ignore_data_skip=True to go on with the "
            "beginning of an epoch"
        )
    if before.ranks != batch.ranks:
        logger.warning(
            "%s was written by %d ranks, and %d resume: the rows of each step stay the same, and where there is "
            "dropout, it is drawn anew",
            checkpoint,
            before.ranks,
            batch.ranks,
        )


def _check_optimizer(checkpoint: Path, accelerator: Accelerator) -> None:
    engine = accelerator.distributed_type
    engine = engine if engine in _OPTIMIZERS else None
    there = {key: sorted(checkpoint.glob(pattern)) for key, (pattern, _) in _OPTIMIZERS.items()}
    written_by = next((key for key in _OPTIMIZERS if there[key]), engine)
    weights = "start a new run from its weights, with the folder as model"
    if written_by != engine:
        raise ValueError(
            f"{checkpoint} was written under {_OPTIMIZERS[written_by][1]}, and this run is under "
            f"{_OPTIMIZERS[engine][1]}, which cannot read its optimizer: resume under the same, or {weights}"
        )
    is_adapter = any(checkpoint.rglob("adapter_config.json"))
    if not there[engine] and engine is not None and not (is_adapter and engine == DistributedType.FSDP):
        raise ValueError(
            f"{checkpoint} has weights alone (save_only_model=True), which {_OPTIMIZERS[engine][1]} cannot resume "
            f"from: {weights}"
        )
    if not there[engine]:
        logger.warning(
            "%s has weights alone (save_only_model=True): the optimizer and the schedule of the learning rate start "
            "afresh",
            checkpoint,
        )
    if engine == DistributedType.DEEPSPEED:
        _check_ranks_of_zero(checkpoint, accelerator, weights)


def _check_ranks_of_zero(checkpoint: Path, accelerator: Accelerator, weights: str) -> None:
    files = list(checkpoint.glob("global_step*/*zero_pp_rank_*_mp_rank_00_optim_states.pt"))
    loads_universal = accelerator.state.deepspeed_plugin.deepspeed_config.get("checkpoint", {}).get("load_universal")
    if files and len(files) != accelerator.num_processes and not loads_universal:
        raise ValueError(
            f"{checkpoint} was written by {len(files)} ranks under DeepSpeed, which resumes with as many, and here are "
            f"{accelerator.num_processes}: start as many, convert the checkpoint (deepspeed.checkpoint.ds_to_universal)"
            f", or {weights}"
        )


def _read_state(checkpoint: str | Path) -> dict:
    return json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())


def begin_checkpoint(folder: Path) -> None:
    """Make a checkpoint that will be overwritten incomplete, and remove what an older version kept in it."""
    for name in (TRAINER_STATE_NAME, _OLD_STATE):
        (folder / name).unlink(missing_ok=True)


def keep_losses(state: TrainerState, objective: Objective) -> None:
    """Put the losses, and what they keep across batches, into the state that the Trainer saves with a checkpoint."""
    state.stateful_callbacks[OBJECTIVE] = {"losses": loss_texts(objective)}
    if objective.state:
        state.stateful_callbacks[LOSSES] = objective.state_dict()


def restore_losses(state: TrainerState, objective: Objective) -> None:
    """Take it over from the state of a checkpoint; losses whose state is not there start afresh, with a warning.

    Where the losses are others than those of the checkpoint's run, a warning names both.
    """
    objective.reset_state()
    # The Trainer takes what is left for the states of callbacks.
    state.stateful_callbacks.pop(BATCH, None)
    state.stateful_callbacks.pop(RUN, None)
    saved = state.stateful_callbacks.pop(LOSSES, {})
    before, now = state.stateful_callbacks.pop(OBJECTIVE, {}).get("losses"), loss_texts(objective)
    if before not in (None, now):
        logger.warning(
            "the checkpoint's run had other losses, (%s), and its optimizer has their gradients: training goes on with "
            "(%s); start a new run from its weights to begin with these",
            "; ".join(before),
            "; ".join(now),
        )
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


def load_adapters(model: PeftModel, checkpoint: str | Path) -> None:
    """Load every adapter of a checkpoint into the model; which of them are active, and what trains, stays as it is.

    PEFT saves the adapter named "default" in the folder itself, and others in a folder of their name. The Trainer
    activates one of them alone, and passes over those of other names.

    Raises:
        ValueError: the checkpoint and the model have adapters of other names.
    """
    folders = {name: Path(checkpoint) if name == "default" else Path(checkpoint, name) for name in model.peft_config}
    saved = saved_adapters(checkpoint)
    if saved != folders.keys():
        raise ValueError(
            f"{checkpoint} has the adapters {', '.join(sorted(saved)) or '(none)'}, and the model has "
            f"{', '.join(sorted(folders))}: give the model the same adapters, under the same names"
        )
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, folder in folders.items():
        model.load_adapter(str(folder), name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains[name])


def saved_adapters(checkpoint: str | Path) -> set[str]:
    """The names of the adapters in a checkpoint."""
    files = (*Path(checkpoint).glob("adapter_config.json"), *Path(checkpoint).glob("*/adapter_config.json"))
    return {file.parent.name if file.parent != Path(checkpoint) else "default" for file in files}


def refuse_adapter_alone(checkpoint: str | Path) -> None:
    """Raise `ValueError` for a checkpoint of adapters, which a policy without one cannot resume from."""
    if saved := saved_adapters(checkpoint):
        raise ValueError(
            f"{checkpoint} has the adapters {', '.join(sorted(saved))}, and the policy of this run has none: pass the "
            "peft_config of the run that wrote it"
        )
