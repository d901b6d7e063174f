"""Adapters that act while a model is tried out: a new one leaves the model as it is, whatever it will do once trained.

LoRA acts on each token alone, and needs no trial. Other methods may look at the whole row, for which a layout or a
sequence that comes later makes a difference.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from hf_prefopt.reference.live import FrozenTensors
from hf_prefopt.scoring.modes import ModuleTree

# Of LoRA on weights of a usual size, B that large changes a layer's output by a tenth to a half.
_NOISE = 0.1


@contextmanager
def acting_adapter(tree: ModuleTree) -> Iterator[None]:
    """Noise is added to what trains of an adapter that is not plain LoRA, for the time of the context.

    The noise is the same on every rank that holds the same tensors.
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
    """Whether every adapted layer is LoRA as it was published, without a variant."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return type(model.base_model) is LoraModel and not any(layer.lora_variant for layer in layers)
