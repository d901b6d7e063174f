"""Save and load all adapters of a PEFT model completely, under every engine, with the name of their base model.

Under ZeRO-3, the Trainer gathers only trained parameters. Without this module, a frozen adapter (the reference, or an
adapter that is active together with the trained one) would be saved without its tensors. A frozen adapter with
`modules_to_save` would not be saved at all.
"""

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from hf_prefopt.reference.choose import adapter_parameters
from hf_prefopt.reference.shards import gathered, is_zero3_partitioned


def with_frozen_adapters(model: nn.Module, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
    """Add the tensors of frozen adapters to a state dict of the trained parameters. Call this function on every rank.

    Args:
        state_dict: The state dict, or `None` on ranks that do not write.
    """
    if not isinstance(model, PeftModel):
        return state_dict
    frozen: dict[str, Tensor] = {}
    for name, parameter in adapter_parameters(model).items():
        if not parameter.requires_grad and is_zero3_partitioned(parameter):
            with gathered(parameter) as values:
                if state_dict is not None and name not in state_dict:
                    frozen[name] = values.to("cpu", copy=True)
    return state_dict if state_dict is None else {**state_dict, **frozen}


def load_adapters(model: PeftModel, checkpoint: str | Path) -> None:
    """Load all adapters of a checkpoint without changing which adapters are active and which parameters are trained.

    PEFT saves the adapter named "default" in the checkpoint folder, and each other adapter in a subfolder with its
    name. The Trainer itself would load only one adapter and activate it.

    Raises:
        ValueError: the checkpoint and the model have adapters with different names or configurations.
    """
    folders = {name: Path(checkpoint) if name == "default" else Path(checkpoint, name) for name in model.peft_config}
    saved = saved_adapters(checkpoint)
    if saved != folders.keys():
        raise ValueError(
            f"{checkpoint} has the adapters {', '.join(sorted(saved)) or '(none)'}, but the model has "
            f"{', '.join(sorted(folders))}: add adapters with the same names to the model"
        )
    for name, folder in folders.items():
        _refuse_other_adapter(folder, name, PeftConfig.from_pretrained(str(folder)), model.peft_config[name])
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, folder in folders.items():
        model.load_adapter(str(folder), name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains[name])


# Entries of an adapter's configuration that do not change what its saved tensors compute. They describe its origin, its
# initialization, its regularization, and ranks that change during training (AdaLoRA).
_WITHOUT_EFFECT = (
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type"),
    *("init_lora_weights", "init_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("lora_dropout", "runtime_config", "rank_pattern", "total_step"),
)


def _refuse_other_adapter(checkpoint: Path, name: str, saved: PeftConfig, config: PeftConfig) -> None:
    """Raise `ValueError` if an adapter's saved configuration differs from `config`, for example in `lora_alpha`."""
    before, now = ({key: _as_json(value) for key, value in one.to_dict().items()} for one in (saved, config))
    differing = [key for key in now if key in before and before[key] != now[key] and key not in _WITHOUT_EFFECT]
    if differing:
        shown = ", ".join(f"{key}={_short(before[key])} (now {_short(now[key])})" for key in differing)
        raise ValueError(
            f"{checkpoint} has the adapter {name!r} with {shown}: pass the peft_config of the run that wrote it, or "
            "start a new run with the checkpoint folder as model"
        )


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:60]}…"


def _as_json(value: Any) -> str:
    """Return the value as JSON, with sorted names, so that their order does not matter."""
    if isinstance(value, set | list | tuple) and all(isinstance(item, str) for item in value):
        value = sorted(value)
    return json.dumps(value, sort_keys=True, default=str)


def saved_adapters(checkpoint: str | Path) -> set[str]:
    """Return the names of the adapters in a checkpoint."""
    files = (*Path(checkpoint).glob("adapter_config.json"), *Path(checkpoint).glob("*/adapter_config.json"))
    return {file.parent.name if file.parent != Path(checkpoint) else "default" for file in files}


def refuse_adapter_alone(checkpoint: str | Path) -> None:
    """Raise `ValueError` if the checkpoint has adapters. Call this function only if the policy has none."""
    if saved := saved_adapters(checkpoint):
        raise ValueError(
            f"{checkpoint} has the adapters {', '.join(sorted(saved))}, but the policy of this run has no adapter: "
            "pass the peft_config of the run that wrote the checkpoint"
        )


def set_base_name(model: nn.Module, name: str | None) -> None:
    """Set the base model's name in the configuration of each adapter, for all later saves and pushes."""
    if name and isinstance(model, PeftModel):
        for config in model.peft_config.values():
            config.base_model_name_or_path = name


def base_name_notes(model: nn.Module) -> list[str]:
    """Return a note if the saved adapter names no base model, or a local folder, which other machines do not have.

    Otherwise, return [].
    """
    if not isinstance(model, PeftModel):
        return []
    name = model.active_peft_config.base_model_name_or_path
    if name and not Path(name).exists():
        return []
    called = f"names a local folder as the base model, {name}" if name else "names no base model"
    return [f"adapter_config.json {called}: set hub_base_model (owner/name) so that others can load the adapter"]
