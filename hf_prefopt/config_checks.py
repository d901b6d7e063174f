"""Check the settings when a configuration is created or changed. Each error names the field and says what to do."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache
from numbers import Integral, Real
from os import PathLike
from types import NoneType
from typing import Any, get_args, get_type_hints

from transformers import TrainingArguments

from hf_prefopt.objective.divergences import ALIASES
from hf_prefopt.objective.objective import Objective

REFERENCES = ("auto", "adapter_off", "adapter:<name>", "model", "copy", "cache", "none")
TRUNCATION_MODES = ("keep_start", "keep_end")
BAD_ROWS = ("error", "drop")
TEXT_AS = ("text", "messages")
LAYOUTS = ("auto", "shared", "around", "padded")
KEPT = ("nothing", "attention")
# Settings that only have an effect if another setting is on. The value has a description of the other setting, and a
# function that tests whether it is on.
READ_WITH: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "f_alpha_divergence_coef": (
        "f_divergence_type='alpha_divergence'",
        lambda args: ALIASES.get(args.f_divergence_type, args.f_divergence_type) == "alpha_divergence",
    ),
    "humanline_log_eps_p": ("humanline=True", lambda args: args.humanline),
    "humanline_log_eps_r": ("humanline=True", lambda args: args.humanline),
    "reference_cache_dir": ("precompute_ref_log_probs=True", lambda args: args.precompute_ref_log_probs),
    "ref_model_mixup_alpha": ("sync_ref_model=True", lambda args: args.sync_ref_model),
    "ref_model_sync_steps": ("sync_ref_model=True", lambda args: args.sync_ref_model),
    "truncation_mode": ("a max_length", lambda args: args.max_length is not None),
    "checkpointing_keeps": ("gradient_checkpointing=True", lambda args: checkpointing(args)[0]),
    "pad_to_multiple_of": ("layout='padded', 'around' or 'auto'", lambda args: args.layout != "shared"),
}


# For each type of a field: a function that tests whether a value has this type, and a text that says what to write.
_TYPES: Mapping[type, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: not isinstance(value, str) and value in (0, 1), "True or False, without quotes"),
    int: (lambda value: isinstance(value, Integral) and not isinstance(value, bool), "a whole number"),
    float: (lambda value: isinstance(value, Real) and not isinstance(value, bool), "a number, without quotes"),
    str: (lambda value: isinstance(value, str | PathLike), "text"),
    NoneType: (lambda value: value is None, "None"),
    list[str]: (lambda value: _is_list_of(value, str), "a list of texts"),
    list[float]: (lambda value: _is_list_of(value, Real), "a list of numbers"),
}


def check_types(args: Any) -> None:
    """Check the types of all settings. If a field is an int, a whole number such as 1e3 is converted to an int.

    Raises:
        ValueError: a value has another type than its field. Without this check, `unpair="false"` would mean
            `unpair=True`, because Python treats any text that is not empty as true.
    """
    config: Any = type(args)
    for name, types in _types_of_fields(config).items():
        value = getattr(args, name)
        if int in types and float not in types and isinstance(value, float) and value.is_integer():
            setattr(args, name, int(value))
        elif not any(_TYPES[one][0](value) for one in types):
            wanted = " or ".join(_TYPES[one][1] for one in types)
            raise ValueError(f"{name}={value!r} must be {wanted}")


@lru_cache
def _types_of_fields(config: type) -> dict[str, tuple[Any, ...]]:
    """Return the allowed types of each field that can be checked, keyed by the field's name.

    Fields with types that are not in `_TYPES`, such as enumerations, are left out. Text fields of `TrainingArguments`
    are left out, too, because `TrainingArguments` also accepts other values for some of them, such as `fsdp=True`.
    """
    hints = get_type_hints(config)
    types = {name: get_args(hints[name]) or (hints[name],) for name in config.__dataclass_fields__}  # type: ignore[attr-defined]
    types = {name: (hints[name],) if hints[name] in _TYPES else given for name, given in types.items()}
    theirs = {field.name for field in fields(TrainingArguments)}
    return {
        name: given
        for name, given in types.items()
        if all(one in _TYPES for one in given) and not (name in theirs and str in given)
    }


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


def check_values(args: Any) -> None:
    """Raise `ValueError` if a setting of `PreferenceConfig` has an invalid value.

    Args:
        args: The `PreferenceConfig`.
    """
    check_choice("truncation_mode", args.truncation_mode, TRUNCATION_MODES)
    check_choice("layout", args.layout, LAYOUTS)
    check_choice("on_bad_rows", args.on_bad_rows, BAD_ROWS)
    if not re.fullmatch("adapter:.+", args.reference):
        check_choice("reference", args.reference, REFERENCES)
    check_choice("text_as", args.text_as, TEXT_AS)
    check_choice("checkpointing_keeps", args.checkpointing_keeps, KEPT)
    if args.checkpointing_keeps != "nothing":
        _check_selective(args)
    _check_mapping(args.column_mapping)
    check_template_kwargs("chat_template_kwargs", args.chat_template_kwargs)
    if args.loss_params is not None and not isinstance(args.loss_params, dict):
        raise ValueError(f"loss_params={args.loss_params!r} must be a dict, or JSON on the command line")
    if args.max_tokens_per_batch is not None and args.max_tokens_per_batch < 1:
        raise ValueError(f"max_tokens_per_batch={args.max_tokens_per_batch} must be at least 1, or None for no limit")
    if not 0 < args.temperature < float("inf"):
        raise ValueError(f"temperature={args.temperature} must be above 0, and finite")
    if args.router_aux_loss_coef is not None and not 0 <= args.router_aux_loss_coef < float("inf"):
        raise ValueError(f"router_aux_loss_coef={args.router_aux_loss_coef} must be at least 0, and finite")
    if args.max_length is not None and args.max_length < 2:
        raise ValueError(f"max_length={args.max_length} leaves no room for a prompt and a response token")
    multiple = args.pad_to_multiple_of
    if multiple is not None and (not isinstance(multiple, int) or multiple < 1):
        raise ValueError(f"pad_to_multiple_of={multiple!r} must be at least 1, or None for no rounding")


def checkpointing(args: Any) -> tuple[bool, dict[str, Any]]:
    """Return whether activation checkpointing is on, and its keyword arguments.

    Both are read from the settings with the prefix `activation_checkpointing` or, under their older name,
    `gradient_checkpointing`.
    """
    names = ("activation_checkpointing", "gradient_checkpointing")
    is_on = any(getattr(args, name, None) for name in names)
    given = (getattr(args, f"{name}_kwargs", None) for name in names)
    return is_on, next((kwargs for kwargs in given if kwargs), {})


def _check_selective(args: Any) -> None:
    kwargs = checkpointing(args)[1]
    if "context_fn" in kwargs:
        raise ValueError(
            f"checkpointing_keeps={args.checkpointing_keeps!r} sets context_fn, which gradient_checkpointing_kwargs "
            "also sets: leave one of them out"
        )
    if kwargs.get("use_reentrant"):
        raise ValueError(
            f"checkpointing_keeps={args.checkpointing_keeps!r} needs checkpointing with use_reentrant=False: leave "
            "use_reentrant out"
        )
    if args.torch_compile:
        raise ValueError(
            f"checkpointing_keeps={args.checkpointing_keeps!r} saves the outputs of single operators, but "
            "torch_compile=True fuses operators: leave one of the two settings out"
        )


def unread_settings(args: Any) -> Iterator[str]:
    """Yield a message for each setting that has no effect because another setting is off.

    Each message says what to do.
    """
    for name, (feature, is_on) in READ_WITH.items():
        value, default = getattr(args, name), type(args).__dataclass_fields__[name].default
        if value != default and not is_on(args):
            yield f"{name}={value!r} is only used with {feature}: set that, or leave {name} out"


def _check_mapping(mapping: Any) -> None:
    if mapping is None:
        return
    is_mapping = isinstance(mapping, dict) and all(isinstance(name, str) for item in mapping.items() for name in item)
    if not is_mapping or len(set(mapping.values())) < len(mapping):
        raise ValueError(
            f"column_mapping={mapping!r} must map names to columns, each column once, as a dict or as JSON on the "
            "command line: {'prompt': 'question', 'chosen': 'answer_a', 'rejected': 'answer_b'}"
        )


# Arguments of the chat template that users cannot set, because `data.template` sets them.
_RENDERING = (
    *("messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    "tokenizer_kwargs",
)


def check_template_kwargs(name: str, kwargs: Any) -> None:
    """Raise `ValueError` unless `kwargs` is a dict of arguments that users can set for a chat template.

    Args:
        name: Name of the setting, for the message.
    """
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f"{name}={kwargs!r} must be a dict, or JSON on the command line")
    taken = [key for key in kwargs or {} if key in _RENDERING]
    if taken:
        raise ValueError(f"{name} sets {taken[0]!r}, which is determined by the rows: leave it out")


def check_reference_settings(args: Any, objective: Objective) -> None:
    """Raise `ValueError` if the reference must move or be cached, but the losses or other settings do not allow it."""
    losses = ", ".join(args.loss_type)
    if args.precompute_ref_log_probs and not objective.needs_reference_model:
        raise ValueError(f"precompute_ref_log_probs=True, but {losses} needs no reference: leave it out")
    if args.precompute_ref_log_probs and objective.reference_token_stats:
        raise ValueError(
            f"precompute_ref_log_probs=True caches log-probs, but {losses} also reads the reference's "
            f"{', '.join(objective.reference_token_stats)} at every token: set precompute_ref_log_probs=False"
        )
    if args.precompute_ref_log_probs and objective.needs_prompts:
        raise ValueError(
            f"precompute_ref_log_probs=True caches log-probs of responses, but {losses} also reads those of prompts: "
            "set precompute_ref_log_probs=False"
        )
    if args.sync_ref_model:
        _check_moving(args, objective, losses)


def _check_moving(args: Any, objective: Objective, losses: str) -> None:
    if not 0 < args.ref_model_mixup_alpha <= 1:
        raise ValueError(f"ref_model_mixup_alpha={args.ref_model_mixup_alpha} must be above 0 and at most 1")
    if args.ref_model_sync_steps < 1:
        raise ValueError(f"ref_model_sync_steps={args.ref_model_sync_steps} must be at least 1")
    if not objective.needs_reference_model:
        raise ValueError(f"sync_ref_model=True, but {losses} needs no reference: leave it out")
    if args.precompute_ref_log_probs:
        raise ValueError(
            "sync_ref_model=True moves the reference, but precompute_ref_log_probs=True (or reference='cache') caches "
            "its scores: choose one of them"
        )
    if args.reference not in ("auto", "copy"):
        raise ValueError(
            f"sync_ref_model=True moves a copy of the trainable weights, but reference={args.reference!r} is no such "
            "copy: leave reference at 'auto'"
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the value of a setting is one of the choices."""
    if value not in choices:
        near = get_close_matches(str(value), choices, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}{meant}")
