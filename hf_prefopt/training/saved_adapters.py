"""Save all adapters of a PEFT model completely, under every engine.

Under ZeRO-3, the Trainer gathers only trained parameters. A frozen adapter (the reference, or an adapter combined with
the trained one) would then be saved without its tensors, and a frozen adapter with `modules_to_save` not at all.
"""

from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from hf_prefopt.reference.choose import adapter_parameters
from hf_prefopt.reference.shards import gathered, is_zero3_partitioned


def with_frozen_adapters(model: nn.Module, state_dict: dict[str, Any] | None) -> dict[str, Any] | None:
    """Add the tensors of frozen adapters to a state dict of the trained parameters; call it on every rank.

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
