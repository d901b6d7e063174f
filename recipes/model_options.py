"""The options of a model and its adapter, as trl names them: used by a recipe, or refused with the recipe to take."""

from dataclasses import fields
from typing import Any

from trl import ModelConfig

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
# Arguments of `from_pretrained` that have options of their own.
LOADING = {"revision": "model_revision", "dtype": "dtype", "attn_implementation": "attn_implementation"}


def check_model_options(model: ModelConfig, adapter: bool, quantized: bool) -> None:
    """Raise `ValueError` if an option would have no effect in a recipe.

    Args:
        adapter: whether the recipe trains an adapter. quantized: whether it quantizes the model beneath.
    """
    if model.lora_task_type != "CAUSAL_LM":
        raise ValueError(f"lora_task_type={model.lora_task_type}: a causal language model is trained; leave it out")
    if adapter and not model.use_peft:
        raise ValueError("this recipe trains an adapter: set use_peft to true, or take dpo_full.py for all weights")
    if not adapter and (given := _changed(model, ("use_peft", *ADAPTER))):
        raise ValueError(f"{given}: this recipe trains all weights; leave it out, or take dpo_lora.py for an adapter")
    if not quantized and (given := _changed(model, (*BITS, *FOUR_BITS))):
        raise ValueError(f"{given}: this recipe does not quantize; leave it out, or take qlora.py")
    if quantized and not (model.load_in_4bit or model.load_in_8bit):
        raise ValueError("this recipe quantizes the model: set load_in_4bit or load_in_8bit, or take dpo_lora.py")
    if model.load_in_8bit and (given := _changed(model, FOUR_BITS)):
        raise ValueError(f"{given} is of 4 bits, and load_in_8bit=True: leave it out")


def _changed(model: ModelConfig, names: tuple[str, ...]) -> str:
    defaults = {field.name: field.default for field in fields(ModelConfig)}
    return ", ".join(f"{name}={getattr(model, name)}" for name in names if getattr(model, name) != defaults[name])


def loading_arguments(model: ModelConfig, others: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `from_pretrained` is told: the options of the model, and `--model_init_kwargs` beside them.

    Raises:
        ValueError: the latter has what is an option of its own.
    """
    twice = [name for name in LOADING if name in (others or {})]
    if twice:
        options = ", ".join(f"--{LOADING[name]} {others[name]}" for name in twice)
        raise ValueError(f"model_init_kwargs has {', '.join(twice)}: set it by its own option, {options}")
    chosen = {name: getattr(model, option) for name, option in LOADING.items()}
    return {**(others or {}), **{name: value for name, value in chosen.items() if value is not None}}
