"""Tied embeddings and heads if an adapter changes only one of them."""

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def cut_tie(policy: PeftModel) -> bool:
    """Copy the head's weight if the head is tied to the embeddings, and return True if it was tied.

    An adapter on the embeddings does not affect the head, but merging it in place into a shared weight would.
    """
    embeddings, head = _weighted(policy.get_input_embeddings()), _weighted(policy.get_output_embeddings())
    if embeddings is None or head is None or embeddings.weight is not head.weight:
        return False
    head.weight = nn.Parameter(head.get_parameter("weight").detach().clone(), requires_grad=False)
    return True


def settle_tie(model: PreTrainedModel) -> None:
    """Tie embeddings and head again if they are equal up to rounding; otherwise set `tie_word_embeddings=False`."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    one, other = embeddings.get_parameter("weight"), head.get_parameter("weight")
    if one.shape == other.shape and torch.allclose(one, other, rtol=torch.finfo(other.dtype).eps, atol=0.0):
        head.weight = embeddings.weight
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _weighted(module: nn.Module | None) -> nn.Module | None:
    """Return the module that holds the base model's weight, without the wrappers of an adapter, or None."""
    while module is not None and "weight" not in module._parameters:
        inner = getattr(module, "base_layer", None)
        module = inner if inner is not None else getattr(module, "original_module", None)
    return module
