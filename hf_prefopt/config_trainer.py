"""Raise an error for the settings of the Trainer that preference training does not support, or correct them."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Optimizers that change weights during each backward pass. A step may have several backward passes.
_IN_BACKWARD = re.compile(r"(ada)?lomo|.*_layerwise")
# For each setting that only some optimizers read, a pattern of the optimizers that do not read it.
_UNREAD_BY: Mapping[str, re.Pattern[str]] = {
    "optim_args": re.compile(r"adamw_torch(_fused|_xla|_npu_fused)?|adafactor|(ada)?lomo"),
    "optim_target_modules": re.compile(r"(?!galore_|apollo_).*"),
}


@dataclass(frozen=True)
class Refusal:
    """The check of a setting that would have no effect, or a different effect than documented.

    Attributes:
        applies: Function that returns True if a value must raise an error.
        reason: Text of the error message after `name=value`. It also says what to do.
    """

    applies: Callable[[Any], bool]
    reason: str


_BY_LENGTH = ("group_by_length", "batch_rebalance")
_STRATEGIES = ("random", "sequential", *_BY_LENGTH)
_FULL_EVAL = Refusal(
    bool,
    "would round the policy's weights in place, and training would continue with the rounded weights: leave it out; "
    "bf16=True evaluates in bf16, model_init_kwargs={'dtype': 'bfloat16'} loads the weights in bf16",
)
REFUSALS: Mapping[str, Refusal] = {
    "label_smoothing_factor": Refusal(
        bool,
        "belongs to the Trainer's cross-entropy, which is not computed here: set label_smoothing, which belongs to "
        "the preference losses",
    ),
    "average_tokens_across_devices": Refusal(
        lambda value: not value,
        "has no effect: a step's loss is the mean over the examples of all devices; leave it out",
    ),
    "label_names": Refusal(
        lambda value: value not in (None, ["labels"]),
        "has no effect: the responses come from columns such as chosen and rejected; leave it out",
    ),
    "bf16_full_eval": _FULL_EVAL,
    "fp16_full_eval": _FULL_EVAL,
    "eval_use_gather_object": Refusal(bool, "has no effect: predictions are tensors; leave it out"),
    "train_sampling_strategy": Refusal(
        lambda value: value not in _STRATEGIES, f"is unknown: set one of {', '.join(_STRATEGIES)}"
    ),
}
# The smallest valid values of numeric settings. The libraries that read these settings check them late or not at all.
LEAST: Mapping[str, float] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataset_num_proc": 1,
    "max_tokens_per_batch": 1,
    "learning_rate": 0,
    "max_grad_norm": 0,
    "weight_decay": 0,
    "logging_steps": 0,
    "save_steps": 0,
    "eval_steps": 0,
    "eval_delay": 0,
    "eval_accumulation_steps": 1,
    "save_total_limit": 1,
}
# Values of include_for_metrics that raise an error, mapped to the reason.
METRIC_EXTRAS = {
    "inputs": "'inputs' would be rows of the batch layout, which do not match the predictions: leave it out; "
    "predictions are in the order of the dataset's rows",
    "loss": "'loss' would repeat the mean of each batch, which does not match the predictions: leave it out; "
    "eval_loss is the mean over the rows",
}


def check_trainer_settings(args: Any) -> None:
    """Raise `ValueError` if preference training does not support a setting of the Trainer or of accelerate."""
    for name, refusal in REFUSALS.items():
        value = getattr(args, name)
        if refusal.applies(value):
            raise ValueError(f"{name}={value!r} {refusal.reason}")
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and not value >= least:  # True also for NaN
            raise ValueError(f"{name}={value} must be at least {least}")
    _refuse_no_steps(args.max_steps, args.num_train_epochs)
    for asked in args.include_for_metrics:
        if asked in METRIC_EXTRAS:
            raise ValueError(f"include_for_metrics: {METRIC_EXTRAS[asked]}")
    if args.mixed_precision == "fp16" and args.use_cpu and args.deepspeed is None:
        name = "fp16=True" if args.fp16 else "the environment variable ACCELERATE_MIXED_PRECISION=fp16"
        raise ValueError(f"{name} has no effect on a CPU: leave it out")
    if args.group_by_prompt and args.train_sampling_strategy != "random":
        raise ValueError(
            f"train_sampling_strategy={args.train_sampling_strategy!r} and group_by_prompt=True both choose the order "
            "of the rows: leave one of them out"
        )
    if args.length_column_name != "length" and args.train_sampling_strategy not in _BY_LENGTH:
        raise ValueError(
            f"length_column_name={args.length_column_name!r} is only read with "
            "train_sampling_strategy='group_by_length' or 'batch_rebalance': set one of them, or leave it out"
        )
    _refuse_unread_by_optimizer(args)
    _refuse_splits_within_steps(args)
    _refuse_wrong_direction(args)
    _refuse_cut_rows(args.parallelism_config)
    _refuse_uneven_batches(args.accelerator_config, args.world_size)
    # By default, accelerate reads a stream on the first rank and splits each of its batches across the ranks.
    args.accelerator_config.dispatch_batches = False


def _refuse_no_steps(max_steps: int, epochs: float) -> None:
    """Raise `ValueError` if training would make no step, or if its length is not a number.

    For `max_steps=0`, the Trainer would make one step with a learning rate of 0. For `num_train_epochs=0`, it would
    make no step. It would treat every negative `max_steps` as -1.
    """
    if max_steps < -1:
        raise ValueError(f"max_steps={max_steps} must be at least 1, or -1 to train for num_train_epochs={epochs:g}")
    name, value = ("num_train_epochs", epochs) if max_steps == -1 else ("max_steps", max_steps)
    if value == 0:
        raise ValueError(
            f"{name}=0 trains nothing: set a number above 0; to evaluate a model without training, leave {name} out "
            "and call trainer.evaluate()"
        )
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be above 0, and finite")


def _optimizer(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _refuse_unread_by_optimizer(args: Any) -> None:
    """Raise `ValueError` for a setting that the optimizer does not read."""
    name = _optimizer(args)
    for setting, optimizers in _UNREAD_BY.items():
        value = getattr(args, setting)
        if value and optimizers.fullmatch(name):
            raise ValueError(f"{setting}={value!r} is not read by optim={name!r}: leave it out, or change optim")


def _refuse_splits_within_steps(args: Any) -> None:
    """Raise `ValueError` if a step has several backward passes and the optimizer changes weights in each of them."""
    name = _optimizer(args)
    if not _IN_BACKWARD.fullmatch(name):
        return
    cut = {"max_tokens_per_batch": None, "gradient_accumulation_steps": 1}
    for setting, whole in cut.items():
        value = getattr(args, setting)
        if value != whole:
            raise ValueError(
                f"optim={name!r} changes the weights in every backward pass, and {setting}={value} causes several "
                f"backward passes per step: leave {setting} out, or choose another optim"
            )


def _refuse_wrong_direction(args: Any) -> None:
    """Raise `ValueError` if the scheduler waits for a metric to fall, but larger values of the metric are better."""
    scheduler = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    kwargs = args.lr_scheduler_kwargs or {}
    if scheduler in ("reduce_lr_on_plateau", "greedy") and args.greater_is_better and "mode" not in kwargs:
        raise ValueError(
            f"lr_scheduler_type={scheduler!r} waits for metric_for_best_model={args.metric_for_best_model!r} to fall, "
            "but greater_is_better=True: set lr_scheduler_kwargs={'mode': 'max'}"
        )


def greater_is_better(metric: str | None, given: bool | None) -> bool | None:
    """Return whether larger values of a metric are better, or `None` to let the Trainer decide.

    The Trainer treats smaller values as better if the metric's name ends in "loss". This function returns False for
    other metrics that should be small: the losses `loss/<name>`, and metrics whose name ends in "/rejected".

    Args:
        metric: The setting `metric_for_best_model`.
        given: The setting `greater_is_better`; `None` if the user has not set it. Otherwise, it is returned.

    Raises:
        ValueError: `given` is `None`, and neither large nor small values of the metric are better in general.
    """
    if metric is None or given is not None:
        return given
    if re.search(r"(^|_)(ref_kl|lengths/[a-z]+)$", metric):
        raise ValueError(
            f"metric_for_best_model={metric!r}: set greater_is_better, because neither large nor small values of this "
            "metric are better in general"
        )
    return False if re.search(r"(^|_)loss/|(^|_)[a-z_]+/rejected$", metric) else None


def _refuse_cut_rows(settings: Any) -> None:
    if settings and (settings.sp_enabled or settings.cp_enabled):
        raise ValueError(
            "parallelism_config splits sequences (sp_size or cp_size above 1), but scored tokens are located by their "
            "position in the whole row: leave both at 1; gradient checkpointing and max_tokens_per_batch save memory"
        )
    if settings and settings.tp_enabled:
        raise ValueError(
            f"parallelism_config.tp_size={settings.tp_size} gives several ranks the same rows, which would be counted "
            "several times: leave it at 1; FSDP and DeepSpeed ZeRO-3 shard a model across ranks"
        )


def _refuse_uneven_batches(settings: Any, world_size: int) -> None:
    """Raise `ValueError` for settings of accelerate with which rows would be lost or counted twice across ranks."""
    if settings.dispatch_batches:
        raise ValueError("accelerator_config.dispatch_batches=True would cut batches whose tensors differ in length")
    if world_size > 1 and settings.split_batches:
        raise ValueError(
            "accelerator_config.split_batches=True splits a batch across ranks, and rows repeated at the end of the "
            "data would count twice: leave it out, and divide per_device_train_batch_size and "
            f"per_device_eval_batch_size by the {world_size} ranks"
        )
    if world_size > 1 and not settings.even_batches:
        raise ValueError(
            "accelerator_config.even_batches=False gives ranks different numbers of batches, so that some would wait "
            "forever: leave it out; rows that are repeated to even out the ranks do not count"
        )


def without_fused_head(liger_kernel_config: dict[str, bool]) -> dict[str, bool]:
    """Return Liger's configuration without the kernel that would replace the model's forward.

    This kernel is `fused_linear_cross_entropy`.

    Raises:
        ValueError: the configuration switches this kernel on.
    """
    if liger_kernel_config.get("fused_linear_cross_entropy"):
        raise ValueError(
            "liger_kernel_config={'fused_linear_cross_entropy': True} replaces the model's forward, but the trainer "
            "installs its own forward, which also never stores all logits: leave it out"
        )
    return {**liger_kernel_config, "fused_linear_cross_entropy": False}
