"""Checks of the model options, and their conversion to a LoRA config, a quantization config and loading arguments."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from transformers.utils import cached_file

from hf_prefopt.loading import holds_adapter
from hf_prefopt.recipe.options import ModelOptions

# The default learning rate for adapters. recipes/configs/base.yaml uses the same value for all losses.
ADAPTER_LEARNING_RATE = 1e-4
ADAPTER = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)
BITS = ("load_in_4bit", "load_in_8bit")
FOUR_BITS = ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage")
# Arguments of `from_pretrained` that have an option of their own, mapped to this option.
LOADING = {"revision": "model_revision", "dtype": "dtype", "attn_implementation": "attn_implementation"}


def check_model_options(model: ModelOptions) -> None:
    """Raise `ValueError` for an invalid option, or an option that has no effect in combination with the others."""
    if model.lora_task_type != "CAUSAL_LM":
        raise ValueError(f"lora_task_type={model.lora_task_type} is not supported, only CAUSAL_LM: leave it out")
    if model.load_in_8bit and model.load_in_4bit:
        raise ValueError("load_in_8bit=True and load_in_4bit=True: choose one of them")
    if model.lora_r < 1:
        raise ValueError(f"lora_r={model.lora_r} must be at least 1")
    if not 0 <= model.lora_dropout < 1:
        raise ValueError(f"lora_dropout={model.lora_dropout} must be at least 0 and below 1")
    if not model.use_peft and (given := _changed(model, ADAPTER)):
        raise ValueError(f"{given} has no effect without an adapter: add use_peft=true, or remove {given}")
    if not model.use_peft and (given := _changed(model, BITS)):
        raise ValueError(f"{given}: quantized weights cannot be trained: add use_peft=true to train an adapter")
    if not model.load_in_4bit and (given := _changed(model, FOUR_BITS)):
        raise ValueError(f"{given} has no effect without load_in_4bit=true: add it, or remove {given}")


def check_model_is_there(model: ModelOptions) -> None:
    """Raise `ValueError` if the model exists neither as a local folder nor on the Hub."""
    name = model.model_name_or_path or ""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
            raise ValueError(
                f"model_name_or_path={name}: no config.json in this folder: pass the folder of a saved model or adapter"
            )
        return
    if folder.is_file():
        raise ValueError(f"model_name_or_path={name} is a file: pass the folder of a model, or a model on the Hub")
    is_path = name.startswith((".", "/", "~", "models/", "runs/")) or name.count("/") > 1
    if is_path:
        demo = "; `make demo` puts SmolLM2 there, or pass HuggingFaceTB/SmolLM2-135M-Instruct"
        raise ValueError(f"model_name_or_path={name}: there is no such folder{demo if 'smollm2' in name else ''}")
    reason = "the Hub has no such model"
    try:
        for file in ("config.json", "adapter_config.json"):
            if cached_file(name, file, revision=model.model_revision, _raise_exceptions_for_missing_entries=False):
                return
    except OSError as error:
        reason = str(error).splitlines()[0]
    if is_offline_mode():
        reason = "not in the Hub cache, and HF_HUB_OFFLINE is set: correct the name, or unset HF_HUB_OFFLINE"
    raise ValueError(f"model_name_or_path={name}: no such folder, and {reason}")


def _changed(model: ModelOptions, names: tuple[str, ...]) -> str:
    defaults = {field.name: field.default for field in fields(ModelOptions)}
    return ", ".join(f"{name}={getattr(model, name)}" for name in names if getattr(model, name) != defaults[name])


def trains_adapter(model: ModelOptions) -> bool:
    """Return whether an adapter is trained: a new adapter, or the adapter that `model_name_or_path` names."""
    return model.use_peft or bool(model.model_name_or_path and holds_adapter(model.model_name_or_path))


def lora_of(model: ModelOptions) -> LoraConfig | None:
    """Return the config of the new LoRA adapter, or `None` if the run adds no adapter."""
    if not model.use_peft:
        return None
    modules = model.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=modules[0] if modules and len(modules) == 1 else modules,  # PEFT reads a string as a pattern
        target_parameters=model.lora_target_parameters,
        modules_to_save=model.lora_modules_to_save,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
    )


def quantization_of(model: ModelOptions) -> BitsAndBytesConfig | None:
    """Return the quantization config, or `None` if the options do not ask for one. 4-bit layers compute in `dtype`."""
    if model.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if not model.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=model.dtype,
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model.bnb_4bit_quant_storage,
    )


def loading_arguments(model: ModelOptions, others: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the arguments of `from_pretrained`: the model options, merged with `model_init_kwargs` (`others`).

    Raises:
        ValueError: If `model_init_kwargs` contains an argument that has a separate option.
    """
    others = others or {}
    twice = [name for name in LOADING if name in others]
    if twice:
        options = ", ".join(f"--{LOADING[name]} {others[name]}" for name in twice)
        raise ValueError(f"model_init_kwargs has {', '.join(twice)}: set it by its own option, {options}")
    chosen = {name: getattr(model, option) for name, option in LOADING.items()}
    return {**others, **{name: value for name, value in chosen.items() if value is not None}}
