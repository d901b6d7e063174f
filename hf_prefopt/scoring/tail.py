"""A model's own way from the hidden states of its body to its outputs, on states that are given to it.

The model's forward is called with its body's forward replaced for that time by one that returns given states. So a
scale, a cap or a layer before the output embeddings is the model's own, whatever it is, and so is a router's auxiliary
loss. The body, which costs the most, is not run again.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def body_of(causal_lm: PreTrainedModel) -> nn.Module:
    """The model beneath the head; some architectures name it otherwise than their own `base_model` says.

    Where what lies beneath has the head in it, as the language model of a multimodal one may, it is that one's body.
    """
    candidates = (causal_lm.base_model, causal_lm.get_decoder(), getattr(causal_lm, "model", None))
    body = next(module for module in candidates if module is not None and module is not causal_lm)
    # Called for every micro-batch, so no modules are walked.
    has_head = getattr(body, "get_output_embeddings", lambda: None)() is causal_lm.get_output_embeddings()
    return body_of(body) if has_head else body


def own_logits(causal_lm: PreTrainedModel, outputs: Any, hidden: Tensor) -> Tensor:
    """`[C, V]`: the logits that the model's forward makes of hidden states `[C, H]` of its body.

    Args:
        causal_lm: a model that `scoring.forward.install_scoring` has been called on.
        outputs: what its body returned.
    """
    with _body_returning(causal_lm, outputs, hidden):
        return causal_lm.plain_forward(**_stand_in(hidden)).logits[0]


def auxiliary_loss(causal_lm: PreTrainedModel, outputs: Any, tokens: Tensor) -> Tensor | None:
    """`[]`: the load-balancing loss that the model's forward makes of its routers' logits; `None` where it makes none.

    Args:
        outputs: what its body returned, with `router_logits`: for each layer, a row for each position.
        tokens: `[N]`, the positions that count, as often as they count.

    Raises:
        RuntimeError: checkpointing has taken the gradient away.
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
        loss = getattr(causal_lm.plain_forward(**_stand_in(hidden), output_router_logits=True), "aux_loss", None)
    needs_gradient = torch.is_grad_enabled() and outputs.last_hidden_state.requires_grad
    if loss is not None and needs_gradient and not loss.requires_grad and _is_checkpointed(causal_lm):
        raise RuntimeError(
            "checkpointing with use_reentrant=True leaves the routers' auxiliary loss without a gradient: set "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or router_aux_loss_coef=0"
        )
    return loss


def _is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _stand_in(hidden: Tensor) -> dict[str, Any]:
    """Arguments of a forward whose body does not read them."""
    ids = hidden.new_zeros(1, len(hidden), dtype=int)
    return {"input_ids": ids, "use_cache": False, "return_dict": True}


@contextmanager
def _body_returning(causal_lm: PreTrainedModel, outputs: Any, hidden: Tensor) -> Iterator[None]:
    """The body's forward returns these outputs, with hidden states `[1, C, H]`, for the time of the context."""
    body = body_of(causal_lm)
    # accelerate's hooks call what they have put aside.
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
