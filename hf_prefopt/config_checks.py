"""Checks of the settings, at construction and whenever they are changed: each error names the field and what to do."""

import re
from typing import Any

from hf_prefopt.objective.objective import Objective

REFERENCES = ("auto", "adapter_off", "adapter:<name>", "model", "copy", "cache", "none")
TRUNCATION_MODES = ("keep_start", "keep_end")
BAD_ROWS = ("error", "drop")
TEXT_AS = ("text", "messages")
LAYOUTS = ("auto", "shared", "padded")


def check_values(args: Any) -> None:
    """Raise `ValueError` if the value of a setting of ours is not one that it may have.

    Args:
        args: a `PreferenceConfig`.
    """
    check_choice("truncation_mode", args.truncation_mode, TRUNCATION_MODES)
    check_choice("layout", args.layout, LAYOUTS)
    check_choice("on_bad_rows", args.on_bad_rows, BAD_ROWS)
    if not re.fullmatch("adapter:.+", args.reference):
        check_choice("reference", args.reference, REFERENCES)
    check_choice("text_as", args.text_as, TEXT_AS)
    _check_mapping(args.column_mapping)
    if args.loss_params is not None and not isinstance(args.loss_params, dict):
        raise ValueError(f"loss_params={args.loss_params!r} is not a mapping: pass a dict, or JSON on the command line")
    if args.max_tokens_per_batch is not None and args.max_tokens_per_batch < 1:
        raise ValueError(f"max_tokens_per_batch={args.max_tokens_per_batch} must be at least 1, or None for no limit")
    if not 0 < args.temperature < float("inf"):
        raise ValueError(f"temperature={args.temperature} must be above 0, and finite")
    if args.max_length is not None and args.max_length < 2:
        raise ValueError(f"max_length={args.max_length} leaves no room for a prompt and a response token")
    if args.pad_to_multiple_of is not None and args.pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of={args.pad_to_multiple_of} must be at least 1, or None for no rounding")


def _check_mapping(mapping: Any) -> None:
    if mapping is None:
        return
    is_mapping = isinstance(mapping, dict) and all(isinstance(name, str) for item in mapping.items() for name in item)
    if not is_mapping or len(set(mapping.values())) < len(mapping):
        raise ValueError(
            f"column_mapping={mapping!r} does not map names to columns, each once: give a dict, or JSON on the command "
            "line, as in {'prompt': 'question', 'chosen': 'answer_a', 'rejected': 'answer_b'}"
        )


def check_trainer_settings(args: Any) -> None:
    """Raise `ValueError` if a preference step cannot honor a setting of the Trainer or of accelerate."""
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} is of the Trainer's cross-entropy, which is not "
            "computed here: set label_smoothing, which losses of preferences take"
        )
    if args.parallelism_config and (args.parallelism_config.sp_enabled or args.parallelism_config.cp_enabled):
        raise ValueError(
            "parallelism_config cuts sequences (sp_size or cp_size above 1), but scored tokens are found by their "
            "place in the whole row: leave it at 1; activation checkpointing and max_tokens_per_batch save memory"
        )
    if args.eval_use_gather_object:
        raise ValueError("eval_use_gather_object=True has no effect: predictions are tensors of examples; leave it out")
    if "inputs" in args.include_for_metrics:
        raise ValueError(
            "include_for_metrics: 'inputs' are rows of the layout here, which do not match predictions: leave it out; "
            "predictions are in the order of the data set's rows"
        )
    if args.accelerator_config.dispatch_batches:
        raise ValueError("accelerator_config.dispatch_batches=True would cut batches whose tensors differ in length")
    _refuse_uneven_batches(args.accelerator_config, args.world_size)
    # Left to itself, accelerate dispatches, and so cuts, the batches of streams.
    args.accelerator_config.dispatch_batches = False


def _refuse_uneven_batches(settings: Any, world_size: int) -> None:
    """Several ranks must draw the rows that are counted, and equally many batches."""
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


def check_reference_settings(args: Any, objective: Objective) -> None:
    """Raise `ValueError` if a reference is to move or to be cached that cannot, or that the losses do not need."""
    losses = ", ".join(args.loss_type)
    if args.precompute_ref_log_probs and not objective.needs_reference_model:
        raise ValueError(f"precompute_ref_log_probs=True, but {losses} needs no reference: leave it out")
    if args.precompute_ref_log_probs and objective.reference_token_stats:
        raise ValueError(
            f"precompute_ref_log_probs=True keeps log-probs, and {losses} also reads the reference's "
            f"{', '.join(objective.reference_token_stats)} at every token: set precompute_ref_log_probs=False"
        )
    if args.sync_ref_model:
        _check_moving(args, objective, losses)
        return
    for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
        value, default = getattr(args, name), type(args).__dataclass_fields__[name].default
        if value != default:
            raise ValueError(f"{name}={value} is only used with sync_ref_model=True")


def _check_moving(args: Any, objective: Objective, losses: str) -> None:
    if not 0 < args.ref_model_mixup_alpha <= 1:
        raise ValueError(f"ref_model_mixup_alpha={args.ref_model_mixup_alpha} is outside (0, 1]")
    if args.ref_model_sync_steps < 1:
        raise ValueError(f"ref_model_sync_steps={args.ref_model_sync_steps} must be at least 1")
    if not objective.needs_reference_model:
        raise ValueError(f"sync_ref_model=True, but {losses} needs no reference: leave it out")
    if args.precompute_ref_log_probs:
        raise ValueError(
            "sync_ref_model=True moves the reference, and precompute_ref_log_probs=True (or reference='cache') keeps "
            "its scores: choose one of them"
        )
    if args.reference not in ("auto", "copy"):
        raise ValueError(
            f"sync_ref_model=True moves a frozen copy of what trains, and reference={args.reference!r} is not one: "
            "leave reference at 'auto'"
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


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the value of a setting is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
