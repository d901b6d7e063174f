"""Names of settings from other libraries, mainly from current and older versions of TRL, and what to use instead.

`hf_prefopt.trl` accepts TRL's current names.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches

_GAMMA = "loss_params={'gamma': ...}"
_MAX_LENGTH = "max_length=..., which bounds prompt and response together"
_NO_PADDING = "nothing: padding is never read"
_NO_LOGITS = "nothing: logits are computed only for scored tokens"
FOREIGN_SETTINGS: Mapping[str, str] = {
    "activation_offloading": "gradient_checkpointing=True, or max_tokens_per_batch=...",
    "alpha": "loss_params={'alpha': ...}",
    "cpo_alpha": "loss_params={'cpo_alpha': ...} with loss_type='cpo', sft_weight=... with another loss",
    "desirable_weight": "loss_params={'desirable_weight': ...}",
    "discopop_tau": "loss_params={'discopop_tau': ...}",
    "dpo_alpha": "sft_weight=...",
    "dpo_beta": "beta=...",
    "dpo_label_smoothing": "label_smoothing=...",
    "force_use_ref_model": "nothing: a ref_model that is passed is the reference",
    "gamma": _GAMMA,
    "gamma_beta_ratio": "loss_params={'gamma_beta_ratio': ...}",
    "generate_during_eval": "trainer.add_callback(hf_prefopt.callbacks.GenerationEvalCallback(trainer))",
    "is_encoder_decoder": "nothing: only decoder-only models are supported",
    "label_pad_token_id": _NO_PADDING,
    "max_completion_length": _MAX_LENGTH,
    "max_prompt_length": _MAX_LENGTH,
    "max_target_length": _MAX_LENGTH,
    "model_adapter_name": "model.set_adapter(name) before you create the trainer",
    "pad_token": _NO_PADDING,
    "padding_free": "nothing: layout='auto' computes no padding",
    "padding_value": _NO_PADDING,
    "precompute_ref_batch_size": "max_tokens_per_batch=..., which also bounds the batches of that pass",
    "pref_beta": "beta=...",
    "pref_ftx": "sft_weight=...",
    "pref_loss": "loss_type=...",
    "ref_adapter_name": "reference='adapter:<name>'",
    "ref_model_init_kwargs": "model_init_kwargs={...}, which also apply to a ref_model given by name",
    "rpo_alpha": "sft_weight=...",
    "simpo_gamma": _GAMMA,
    "tpo_alpha": "loss_params={'tpo_alpha': ...}",
    "tpo_l_gamma": _GAMMA,
    "trust_remote_code": "model_init_kwargs={'trust_remote_code': ...}",
    "undesirable_weight": "loss_params={'undesirable_weight': ...}",
    "use_logits_to_keep": _NO_LOGITS,
    "use_num_logits_to_keep": _NO_LOGITS,
}
# A setting in one of these texts: its name and its value.
_SETTING = re.compile(r"\b(\w+)=(\.\.\.|\{.*?\}|'[^']*'|\w+)")
# Common short names of settings.
USUAL_NAMES: Mapping[str, str] = {
    "accumulation_steps": "gradient_accumulation_steps",
    "batch_size": "per_device_train_batch_size",
    "data": "dataset_name",
    "dataset": "dataset_name",
    "epochs": "num_train_epochs",
    "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "load_4bit": "load_in_4bit",
    "loss": "loss_type",
    "lora": "use_peft",
    "lora_rank": "lora_r",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "output": "output_dir",
    "peft": "use_peft",
    "resume": "resume_from_checkpoint",
    "scheduler": "lr_scheduler_type",
    "tokenizer": "model_name_or_path",
    "train_batch_size": "per_device_train_batch_size",
    "train_file": "dataset_name",
    "warmup_ratio": "warmup_steps",
}
# Arguments of trainers, not settings.
FOREIGN_ARGUMENTS: Mapping[str, str] = {
    "tokenizer": "processing_class=tokenizer",
    "tools": "a column `tools` of the rows",
    "reference_model": "ref_model=...",
    "dataset_name": "dataset=...",
}


def refuse_foreign_settings(given: Collection[str], known: Collection[str], config: str) -> None:
    """Raise `TypeError` for names from other libraries; the message says what to use instead.

    Args:
        given: the names. known: the fields of the configuration. config: the name of the configuration.
    """
    for name in given:
        if name not in known and name in FOREIGN_SETTINGS:
            raise TypeError(f"{config} has no field {name}: write {FOREIGN_SETTINGS[name]}")


def refuse_foreign_arguments(
    given: Iterable[str], settings: Collection[str] = (), config: str = "PreferenceConfig"
) -> None:
    """Raise `TypeError` for names from other libraries and for settings that are passed to a trainer as arguments.

    Args:
        settings: the fields of the configuration. config: the name of the configuration.
    """
    for name in given:
        if name in FOREIGN_ARGUMENTS:
            raise TypeError(f"there is no argument {name}: write {FOREIGN_ARGUMENTS[name]}")
        if name in settings:
            raise TypeError(f"{name} is a setting, not an argument: write args={config}({name}=...)")
        if name in FOREIGN_SETTINGS:
            raise TypeError(f"there is no argument or setting {name}: write {FOREIGN_SETTINGS[name]}")


def nearest_setting(name: str, known: Collection[str]) -> str | None:
    """The setting that a name probably means: what it is short for, or the one that is spelled most alike."""
    usual = USUAL_NAMES.get(name)
    return usual if usual in known else next(iter(get_close_matches(name, known, 1)), None)


def hints_in(text: str, write: Callable[[str, str], str] = "{}={}".format) -> str:
    """What to use instead of the other libraries' settings that a message names; empty if it names none.

    Args:
        write: how a setting is written, from its name and its value.
    """
    named = sorted(FOREIGN_SETTINGS.keys() & set(re.findall(r"\w+", text)))
    return "".join(
        f"; use {_SETTING.sub(lambda found: write(*found.groups()), FOREIGN_SETTINGS[name])}" for name in named
    )


def as_option(name: str, value: str) -> str:
    """A setting on the command line: `--loss_params '{"gamma": ...}'` for `loss_params={'gamma': ...}`."""
    typed = value.strip("'") if value[0] == "'" else value.lower() if value in ("True", "False") else value
    return f"--{name} '{typed.replace(chr(39), chr(34))}'" if typed[0] == "{" else f"--{name} {typed}"


def as_yaml(name: str, value: str) -> str:
    """A setting in a YAML file."""
    return f"{name}: {value.strip(chr(39)) if value[0] == chr(39) else value}"
