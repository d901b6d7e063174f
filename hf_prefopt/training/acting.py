"""Add noise to new adapters during the trial forward passes that check a model, so that they also check its adapters.

A new adapter does not change the model's output, so a trial without noise would not show problems of the adapter.
Plain LoRA computes each token independently, so it gets no noise. Other methods may use all tokens of a row, so their
output may depend on the batch layout or on later tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from hf_prefopt.reference.live import FrozenTensors
from hf_prefopt.scoring.modes import ModuleTree

# Standard deviation of the noise. A LoRA matrix B with such entries changes the output of a layer with weights of
# typical size by 10 to 50 %.
_NOISE = 0.1


@contextmanager
def acting_adapter(tree: ModuleTree) -> Iterator[None]:
    """Return a context manager that adds noise to the trained tensors of an adapter, unless the adapter is plain LoRA.

    The tensors are restored when the context ends. Ranks that have the same tensors add the same noise.
    """
    if not isinstance(tree.model, PeftModel) or _acts_on_tokens_alone(tree.model):
        yield
        return
    noisy = FrozenTensors(tree)
    generator = torch.Generator().manual_seed(0)
    for values in noisy.tensors.values():
        values += (_NOISE * torch.randn(values.shape, generator=generator)).to(values)
    with noisy.swapped_in():
        yield


def _acts_on_tokens_alone(model: nn.Module) -> bool:
    """Return True if every adapted layer is plain LoRA, without a variant such as DoRA."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return type(model.base_model) is LoraModel and not any(layer.lora_variant for layer in layers)
