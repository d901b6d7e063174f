"""Merge adapters into models whose embeddings and head are tied, if the adapter changes only one of the two."""

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def cut_tie(policy: PeftModel) -> bool:
    """If the head shares its weight with the embeddings, give it a copy of the weight. Return True if it was shared.

    An adapter on the embeddings does not change the head. Merging it in place into a shared weight would change the
    head.
    """
    embeddings, head = _weighted(policy.get_input_embeddings()), _weighted(policy.get_output_embeddings())
    if embeddings is None or head is None or embeddings.weight is not head.weight:
        return False
    head.weight = nn.Parameter(head.get_parameter("weight").detach().clone(), requires_grad=False)
    return True


def settle_tie(model: PreTrainedModel) -> None:
    """Tie embeddings and head again if their weights are equal up to rounding.

    Otherwise, set `tie_word_embeddings=False` in the model's configuration.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    one, other = embeddings.get_parameter("weight"), head.get_parameter("weight")
    if one.shape == other.shape and torch.allclose(one, other, rtol=torch.finfo(other.dtype).eps, atol=0.0):
        head.weight = embeddings.weight
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _weighted(module: nn.Module | None) -> nn.Module | None:
    """Return the module that holds the weight of the base model, inside PEFT's wrappers; None if there is no weight."""
    while module is not None and "weight" not in module._parameters:
        inner = getattr(module, "base_layer", None)
        module = inner if inner is not None else getattr(module, "original_module", None)
    return module
