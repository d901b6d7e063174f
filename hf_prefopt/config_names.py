"""Names of settings in other libraries, mainly in current and older versions of TRL, and what to use instead.

The classes in `hf_prefopt.trl` accept TRL's current names.
"""

import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches

_GAMMA = "use loss_params={'gamma': ...}"
_MAX_LENGTH = "use max_length=N, which limits prompt and response together"
_NO_PADDING = "remove it: padding is never read"
_NO_LOGITS = "remove it: logits are computed only for scored tokens"
# In these texts, `...` stands for the value that the user gave.
FOREIGN_SETTINGS: Mapping[str, str] = {
    "alpha": "use loss_params={'alpha': ...}",
    "cpo_alpha": "use loss_params={'cpo_alpha': ...} with loss_type='cpo', sft_weight=... with another loss",
    "desirable_weight": "use loss_params={'desirable_weight': ...}",
    "discopop_tau": "use loss_params={'discopop_tau': ...}",
    "dpo_alpha": "use sft_weight=...",
    "dpo_beta": "use beta=...",
    "dpo_label_smoothing": "use label_smoothing=...",
    "force_use_ref_model": "remove it: a ref_model that is passed is the reference",
    "gamma": _GAMMA,
    "gamma_beta_ratio": "use loss_params={'gamma_beta_ratio': ...}",
    "generate_during_eval": "call trainer.add_callback(hf_prefopt.callbacks.GenerationEvalCallback(trainer))",
    "is_encoder_decoder": "remove it: only decoder-only models are supported",
    "label_pad_token_id": _NO_PADDING,
    "max_completion_length": _MAX_LENGTH,
    "max_prompt_length": _MAX_LENGTH,
    "max_target_length": _MAX_LENGTH,
    "model_adapter_name": "call model.set_adapter(name) before you create the trainer",
    "pad_token": _NO_PADDING,
    "padding_free": "remove it: batches have no padding by default (layout='auto')",
    "padding_value": _NO_PADDING,
    "precompute_ref_batch_size": "use max_tokens_per_batch=N, which also bounds the batches of that pass",
    "pref_beta": "use beta=...",
    "pref_ftx": "use sft_weight=...",
    "pref_loss": "use loss_type=...",
    "ref_adapter_name": "use reference='adapter:...'",
    "ref_model_init_kwargs": "use model_init_kwargs=..., which also apply to a ref_model given by name",
    "rpo_alpha": "use sft_weight=...",
    "simpo_gamma": _GAMMA,
    "tpo_alpha": "use loss_params={'tpo_alpha': ...}",
    "tpo_l_gamma": _GAMMA,
    "trust_remote_code": "use model_init_kwargs={'trust_remote_code': ...}",
    "undesirable_weight": "use loss_params={'undesirable_weight': ...}",
    "use_logits_to_keep": _NO_LOGITS,
    "use_num_logits_to_keep": _NO_LOGITS,
}
# Matches a setting in a message, written as in Python (`name=value`). The groups are its name and its value.
_SETTING = re.compile(
    r"(?<![\w.\-])(\w+)=(\.\.\.|\{(?:[^{}]|\{[^{}]*\})*\}|\[[^\]]*\]|'[^']*'|\"[^\"]*\"|[^\s,;:()'\"]*[^\s,;:()'\".])"
)
# Common short names that users try, mapped to the names of the settings.
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
# Arguments of other libraries' trainers (not settings), and what to use instead.
FOREIGN_ARGUMENTS: Mapping[str, str] = {
    "tokenizer": "use processing_class=tokenizer",
    "tools": "use a column `tools` of the rows",
    "reference_model": "use ref_model=...",
    "dataset_name": "use dataset=...",
}


def refuse_foreign_settings(given: Collection[str], known: Collection[str], config: str) -> None:
    """Raise `TypeError` for names of settings from other libraries. The message says what to use instead.

    Args:
        given: Names that the user gave.
        known: Names of the fields of the configuration.
        config: Class name of the configuration, for the message.
    """
    for name in given:
        if name not in known and name in FOREIGN_SETTINGS:
            raise TypeError(f"{config} has no field {name}: {FOREIGN_SETTINGS[name]}")


def refuse_foreign_arguments(
    given: Iterable[str], settings: Collection[str] = (), config: str = "PreferenceConfig"
) -> None:
    """Raise `TypeError` if a name is no argument of the trainer but a setting, or a name from another library.

    Args:
        given: Names of the arguments that were passed to the trainer.
        settings: Names of the fields of the configuration.
        config: Class name of the configuration, for the message.
    """
    for name in given:
        if name in FOREIGN_ARGUMENTS:
            raise TypeError(f"there is no argument {name}: {FOREIGN_ARGUMENTS[name]}")
        if name in settings:
            raise TypeError(f"{name} is a setting, not an argument: use args={config}({name}=...)")
        if name in FOREIGN_SETTINGS:
            raise TypeError(f"there is no argument or setting {name}: {FOREIGN_SETTINGS[name]}")


def nearest_setting(name: str, known: Collection[str]) -> str | None:
    """Return the setting for which a name is a common short name, or else the setting with the most similar spelling.

    Return `None` if there is neither.
    """
    usual = USUAL_NAMES.get(name)
    return usual if usual in known else next(iter(get_close_matches(name, known, 1)), None)


def hint_for(name: str, write: Callable[[str, str], str], value: str = "...") -> str:
    """Return the end of a message, which says what to use instead of another library's setting.

    Return "" if the name is not in `FOREIGN_SETTINGS`.

    Args:
        write: Function that formats a setting, given its name and its value in Python notation.
        value: Value that the user gave.
    """
    text = rewritten(FOREIGN_SETTINGS.get(name, ""), write)
    return f": {text.replace('...', value)}" if text else ""


def rewritten(text: str, write: Callable[[str, str], str], names: Collection[str] | None = None) -> str:
    """Rewrite the settings in a message from Python notation (`name=value`) to another notation.

    Args:
        write: Function that formats a setting, given its name and its value in Python notation.
        names: Names of the settings to rewrite. Default: everything that looks like a setting.
    """
    return _SETTING.sub(lambda found: write(*found.groups()) if names is None or found[1] in names else found[0], text)


def as_option(name: str, value: str) -> str:
    """Format a setting as a command-line option: `--loss_params '{"gamma": 1}'` for `loss_params={'gamma': 1}`."""
    words = re.findall(r"[^\s,'\"]+", value.strip("[]")) if value[0] == "[" else [value.strip("'\"")]
    if value[0] == "{":
        words = [re.sub(r"\b(True|False|None)\b", lambda found: _JSON[found[0]], value.replace("'", '"'))]
    return " ".join([f"--{name}", *(shlex.quote(_WORDS.get(word, word)) for word in words)])


_JSON = {"True": "true", "False": "false", "None": "null"}
_WORDS = {"True": "true", "False": "false", "None": "none"}


def as_yaml(name: str, value: str) -> str:
    """Format a setting as in a YAML file."""
    return f"{name}: {_WORDS.get(value, value)}"
