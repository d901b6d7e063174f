"""Settings of the Trainer that a preference step cannot honor: refused, with what to do, or put right."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Optimizers that change weights inside the backward, of which a step may have several.
_IN_BACKWARD = re.compile(r"(ada)?lomo|.*_layerwise")


@dataclass(frozen=True)
class Refusal:
    """A setting that would have no effect, or another one than it says.

    Attributes:
        applies: whether a value raises an error.
        reason: follows `name=value` in the error, and says what to do.
    """

    applies: Callable[[Any], bool]
    reason: str


_FULL_EVAL = Refusal(
    bool,
    "would round the policy's weights in place, and training would go on with them: leave it out; bf16=True evaluates "
    "in bf16, model_init_kwargs={'dtype': 'bfloat16'} loads the weights in it",
)
REFUSALS: Mapping[str, Refusal] = {
    "label_smoothing_factor": Refusal(
        bool,
        "is of the Trainer's cross-entropy, which is not computed here: set label_smoothing, which losses of "
        "preferences take",
    ),
    "average_tokens_across_devices": Refusal(
        lambda value: not value,
        "has no effect: a step's loss is the mean over the examples of all devices; leave it out",
    ),
    "label_names": Refusal(
        lambda value: value not in (None, ["labels"]),
        "has no effect: what is compared is read from columns such as chosen and rejected; leave it out",
    ),
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
    "eval_use_gather_object": Refusal(bool, "has no effect: predictions are tensors of examples; leave it out"),
    "train_sampling_strategy": Refusal(
        lambda value: value not in ("random", "sequential"),
        "reads the length of input_ids, which preference rows do not have: leave it out; layout='shared' computes no "
        "padding, and max_tokens_per_batch bounds the positions of a batch",
    ),
    "length_column_name": Refusal(
        lambda value: value != "length", "has no effect: no sampling strategy reads lengths here; leave it out"
    ),
}
# The least values of numbers, which the libraries that read them do not check, or check late.
LEAST: Mapping[str, float] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataset_num_proc": 1,
    "max_tokens_per_batch": 1,
    "learning_rate": 0,
    "num_train_epochs": 0,
    "max_grad_norm": 0,
    "weight_decay": 0,
    "logging_steps": 0,
    "save_steps": 0,
}
# Values of include_for_metrics, and why they are refused.
METRIC_EXTRAS = {
    "inputs": "'inputs' are rows of the layout here, which do not match predictions: leave it out; predictions are in "
    "the order of the data set's rows",
    "loss": "'loss' would be the mean of a batch, once for each place in it, which does not match predictions: leave "
    "it out; eval_loss is the mean over the rows",
}


def check_trainer_settings(args: Any) -> None:
    """Raise `ValueError` if a preference step cannot honor a setting of the Trainer or of accelerate."""
    for name, refusal in REFUSALS.items():
        value = getattr(args, name)
        if refusal.applies(value):
            raise ValueError(f"{name}={value!r} {refusal.reason}")
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least and not (name == "num_train_epochs" and args.max_steps > 0):
            raise ValueError(f"{name}={value} must be at least {least}")
    for asked in args.include_for_metrics:
        if asked in METRIC_EXTRAS:
            raise ValueError(f"include_for_metrics: {METRIC_EXTRAS[asked]}")
    if args.mixed_precision == "fp16" and args.use_cpu and args.deepspeed is None:
        raise ValueError("fp16=True (or ACCELERATE_MIXED_PRECISION=fp16) has no effect on a CPU: leave it out")
    if args.group_by_prompt and args.train_sampling_strategy != "random":
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} and group_by_prompt=True both choose the order "
            "of the rows: leave one of them out"
        )
    _refuse_splits_within_steps(args)
    _refuse_wrong_direction(args)
    _refuse_cut_rows(args.parallelism_config)
    _refuse_uneven_batches(args.accelerator_config, args.world_size)
    # Left to itself, accelerate dispatches, and so cuts, the batches of streams.
    args.accelerator_config.dispatch_batches = False


def _refuse_splits_within_steps(args: Any) -> None:
    """An optimizer that changes weights in every backward must have one backward in a step."""
    name = str(getattr(args.optim, "value", args.optim))
    if not _IN_BACKWARD.fullmatch(name):
        return
    cut = {"max_tokens_per_batch": None, "gradient_accumulation_steps": 1}
    for setting, whole in cut.items():
        value = getattr(args, setting)
        if value != whole:
            raise ValueError(
                f"optim={name!r} changes the weights in every backward, and {setting}={value} makes several of them "
                f"a step: leave {setting} out, or choose another optim"
            )


def _refuse_wrong_direction(args: Any) -> None:
    """A scheduler that watches a metric takes it for one that falls, unless it is told."""
    scheduler = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    kwargs = args.lr_scheduler_kwargs or {}
    if scheduler in ("reduce_lr_on_plateau", "greedy") and args.greater_is_better and "mode" not in kwargs:
        raise ValueError(
            f"lr_scheduler_type={scheduler!r} waits for metric_for_best_model={args.metric_for_best_model!r} to fall, "
            "and greater_is_better=True: set lr_scheduler_kwargs={'mode': 'max'}"
        )


def greater_is_better(metric: str | None, given: bool | None) -> bool | None:
    """Whether more of a metric is better; `None` leaves it to the Trainer, which looks for names that end in "loss".

    Args:
        metric: `metric_for_best_model`; the losses of an objective are `loss/<name>`.
        given: what the user says.
    """
    is_a_loss = metric is not None and re.search(r"(^|_)loss/", metric)
    return False if given is None and is_a_loss else given


def _refuse_cut_rows(settings: Any) -> None:
    if settings and (settings.sp_enabled or settings.cp_enabled):
        raise ValueError(
            "parallelism_config cuts sequences (sp_size or cp_size above 1), but scored tokens are found by their "
            "place in the whole row: leave it at 1; activation checkpointing and max_tokens_per_batch save memory"
        )
    if settings and settings.tp_enabled:
        raise ValueError(
            f"parallelism_config.tp_size={settings.tp_size} gives several ranks the same rows, which would be counted "
            "once for each: leave it at 1; FSDP and DeepSpeed ZeRO-3 share a model among ranks"
        )


def _refuse_uneven_batches(settings: Any, world_size: int) -> None:
    """Several ranks must draw the rows that are counted, and equally many batches."""
    if settings.dispatch_batches:
        raise ValueError("accelerator_config.dispatch_batches=True would cut batches whose tensors differ in length")
    if world_size > 1 and settings.split_batches:
        raise ValueError(
            "accelerator_config.split_batches=True splits a batch among the ranks, and rows that repeat at the end of "
            "the data would count again: leave it out, and divide per_device_train_batch_size and "
            f"per_device_eval_batch_size by the {world_size} ranks"
        )
    if world_size > 1 and not settings.even_batches:
        raise ValueError(
            "accelerator_config.even_batches=False gives ranks different numbers of batches, and those with more would "
            "wait for the others forever: leave it out; rows that are repeated to even them out do not count"
        )


def without_fused_head(liger_kernel_config: dict[str, bool]) -> dict[str, bool]:
    """Liger's kernels except the one that replaces the model's forward, in which log-probs are computed here.

    Raises:
        ValueError: it is asked for.
    """
    if liger_kernel_config.get("fused_linear_cross_entropy"):
        raise ValueError(
            "liger_kernel_config={'fused_linear_cross_entropy': True} replaces the model's forward, and the trainer "
            "needs its own, which never holds all logits either: leave it out"
        )
    return {**liger_kernel_config, "fused_linear_cross_entropy": False}
