"""Compute logits and the auxiliary loss with the model's own code, from given hidden states of the base model.

The model's forward is called while the base model's forward is replaced by a function that returns given hidden states.
Any scale, cap or layer between base model and logits is then applied by the model's own code, which also computes the
auxiliary loss of routers. The base model, which is the most expensive part, is not run again.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def body_of(causal_lm: PreTrainedModel) -> nn.Module:
    """Return the base model (the model without its head).

    In some architectures, the attribute `base_model` is the model itself, so other attributes are tried. If the module
    found in this way contains the head, as in some multimodal models, return the base model of this inner model.
    """
    candidates = (causal_lm.base_model, causal_lm.get_decoder(), getattr(causal_lm, "model", None))
    body = next(module for module in candidates if module is not None and module is not causal_lm)
    # This function runs for every micro-batch, so it does not iterate over all modules.
    has_head = getattr(body, "get_output_embeddings", lambda: None)() is causal_lm.get_output_embeddings()
    return body_of(cast(PreTrainedModel, body)) if has_head else body


def own_logits(causal_lm: PreTrainedModel, outputs: Any, hidden: Tensor) -> Tensor:
    """Compute logits `[C, V]` from the base model's hidden states `[C, H]`, with the model's own forward.

    Args:
        causal_lm: A model prepared by `scoring.forward.install_scoring`.
        outputs: Outputs of the base model.
        hidden: Hidden states of the base model at C positions.
    """
    with _body_returning(causal_lm, outputs, hidden):
        return _plain_forward(causal_lm)(**_stand_in(hidden)).logits[0]


def auxiliary_loss(causal_lm: PreTrainedModel, outputs: Any, tokens: Tensor) -> Tensor | None:
    """Compute the load-balancing loss (a scalar tensor) from router logits with the model's own forward.

    Return `None` if the model computes no such loss.

    Args:
        causal_lm: A model prepared by `scoring.forward.install_scoring`.
        outputs: Outputs of the base model, with `router_logits`: one tensor per layer, with one row per position.
        tokens: `[N]` int64. Positions in the flattened batch that the loss counts. A position that counts several times
            occurs several times.

    Raises:
        RuntimeError: the loss has no gradient because of reentrant activation checkpointing.
    """
    if not getattr(outputs, "router_logits", None):
        return None
    counted = copy.copy(outputs)
    counted["router_logits"] = tuple(
        logits.reshape(-1, logits.shape[-1]).index_select(0, tokens.to(logits.device))
        for logits in outputs.router_logits
    )
    hidden = outputs.last_hidden_state[0, :1].detach()
    with _body_returning(causal_lm, counted, hidden):
        loss = getattr(_plain_forward(causal_lm)(**_stand_in(hidden), output_router_logits=True), "aux_loss", None)
    needs_gradient = torch.is_grad_enabled() and outputs.last_hidden_state.requires_grad
    if loss is not None and needs_gradient and not loss.requires_grad and _is_checkpointed(causal_lm):
        raise RuntimeError(
            "the auxiliary router loss has no gradient under checkpointing with use_reentrant=True: set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or router_aux_loss_coef=0"
        )
    return loss


def _plain_forward(causal_lm: PreTrainedModel) -> Callable[..., Any]:
    return cast("Callable[..., Any]", causal_lm.plain_forward)


def _is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _stand_in(hidden: Tensor) -> dict[str, Any]:
    """Return placeholder arguments for a forward whose base model ignores its arguments."""
    ids = hidden.new_zeros(1, len(hidden), dtype=torch.long)
    return {"input_ids": ids, "use_cache": False, "return_dict": True}


@contextmanager
def _body_returning(causal_lm: PreTrainedModel, outputs: Any, hidden: Tensor) -> Iterator[None]:
    """Make the base model's forward return the given outputs, with hidden states `[1, C, H]`, within this context."""
    body = body_of(causal_lm)
    # accelerate's hooks call the forward stored as `_old_forward`.
    place = "_old_forward" if hasattr(body, "_hf_hook") else "forward"
    given = copy.copy(outputs)
    given["last_hidden_state"] = hidden[None]
    before = vars(body).get(place)
    vars(body)[place] = lambda *_, **__: given
    try:
        yield
    finally:
        if before is None:
            del vars(body)[place]
        else:
            vars(body)[place] = before
