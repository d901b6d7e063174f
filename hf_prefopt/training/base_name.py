"""Set and check the base model's name in an adapter's configuration: a Hub name, or a local folder."""

from pathlib import Path

from peft import PeftModel
from torch import nn


def set_base_name(model: nn.Module, name: str | None) -> None:
    """Set the base model's name in the configuration of each adapter, for all later saves and pushes."""
    if name and isinstance(model, PeftModel):
        for config in model.peft_config.values():
            config.base_model_name_or_path = name


def base_name_notes(model: nn.Module) -> list[str]:
    """Return a note if the saved adapter could not find its base model on another machine; [] otherwise."""
    if not isinstance(model, PeftModel):
        return []
    name = model.active_peft_config.base_model_name_or_path
    if name and not Path(name).exists():
        return []
    called = f"names a local folder as the base model, {name}" if name else "names no base model"
    return [f"adapter_config.json {called}: set hub_base_model (owner/name) so that others can load the adapter"]
