"""What an adapter calls its base model: a name on the Hub, by which others find it, or a folder of this machine."""

from pathlib import Path

from peft import PeftModel
from torch import nn


def set_base_name(model: nn.Module, name: str | None) -> None:
    """Let the configurations of a model's adapters name their base so, in what is saved and pushed from then on."""
    if name and isinstance(model, PeftModel):
        for config in model.peft_config.values():
            config.base_model_name_or_path = name


def base_name_notes(model: nn.Module) -> list[str]:
    """What there is to say where an adapter that is used elsewhere would not find its base model."""
    if not isinstance(model, PeftModel):
        return []
    name = model.active_peft_config.base_model_name_or_path
    if name and not Path(name).exists():
        return []
    called = f"names its base by a folder of this machine, {name}" if name else "names no base model"
    return [f"adapter_config.json {called}: set hub_base_model (owner/name) for an adapter that others load"]
