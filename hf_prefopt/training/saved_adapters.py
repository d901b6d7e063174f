"""What of its adapters a PEFT model saves: all of them, whole, under every engine.

Under ZeRO-3 the Trainer gathers only what trains. An adapter that is the reference, or is stacked beneath the one that
trains, would then be saved without its tensors, and one with `modules_to_save` would not be saved at all.
"""

from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from hf_prefopt.reference.choose import adapter_parameters
from hf_prefopt.reference.shards import gathered, is_zero3_partitioned


def with_frozen_adapters(model: nn.Module, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
    """A state dict of what trains, and in it the tensors of adapters that do not; call it on every rank.

    Args:
        state_dict: `None` on ranks that do not write.
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
