"""Embeddings and a head that share their weights, where an adapter changes one of the two."""

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def cut_tie(policy: PeftModel) -> bool:
    """Give the head weights of its own, equal to the embeddings', if it shares theirs; whether it did.

    An adapter on the embeddings alone leaves the head as it was, and merging it in place would not.
    """
    embeddings, head = _weighted(policy.get_input_embeddings()), _weighted(policy.get_output_embeddings())
    if embeddings is None or head is None or embeddings.weight is not head.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return True


def settle_tie(model: PreTrainedModel) -> None:
    """Tie embeddings and head again if they are equal, up to the last digit; or else say in the config that they are
    not."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    rounding = torch.finfo(head.weight.dtype).eps
    same = embeddings.weight.shape == head.weight.shape
    if same and torch.allclose(embeddings.weight, head.weight, rtol=rounding, atol=0.0):
        head.weight = embeddings.weight
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _weighted(module: nn.Module | None) -> nn.Module | None:
    """The module that holds the base's weight, beneath an adapter."""
    while module is not None and "weight" not in module._parameters:
        inner = getattr(module, "base_layer", None)
        module = inner if inner is not None else getattr(module, "original_module", None)
    return module
