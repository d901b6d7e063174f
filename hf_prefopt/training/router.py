"""Determine the coefficient of the load-balancing loss (auxiliary loss) of a mixture of experts.

As in TRL, the loss is added if the model's config has the field `output_router_logits` and a nonzero
`router_aux_loss_coef`.
"""

import random

import torch
from peft import PeftModel
from torch import nn

from hf_prefopt.scoring.agreement import device_of, made_up_tokens, scored_batch
from hf_prefopt.scoring.forward import base_causal_lm, score
from hf_prefopt.scoring.modes import evaluation_mode


def aux_loss_coef(model: nn.Module, setting: float | None) -> float:
    """Return the coefficient of the routers' auxiliary loss; 0 if the model has no such loss.

    Args:
        setting: Value of `router_aux_loss_coef`; if it is `None`, the model's config decides.

    Raises:
        ValueError: a coefficient is set, but the model cannot return router logits.
    """
    causal_lm = base_causal_lm(model)
    config = causal_lm.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if setting:
            raise ValueError(
                f"router_aux_loss_coef={setting}: {type(causal_lm).__name__} has no auxiliary loss, because its config "
                "has no output_router_logits: remove router_aux_loss_coef"
            )
        return 0.0
    return float(setting if setting is not None else getattr(config, "router_aux_loss_coef", None) or 0.0)


def settled_aux_loss(model: nn.Module, coefficient: float, setting: float | None) -> tuple[float, list[str]]:
    """Test on synthetic tokens whether the model computes an auxiliary loss.

    Args:
        model: A model prepared by `scoring.forward.install_scoring`, on its device.
        coefficient: Result of `aux_loss_coef`.
        setting: Value of `router_aux_loss_coef`.

    Returns:
        The coefficient (0 if the model computes no auxiliary loss), and notes for the start summary.

    Raises:
        ValueError: `setting` is a coefficient, but the model computes no auxiliary loss.
    """
    causal_lm = base_causal_lm(model)
    name = type(causal_lm).__name__
    if not coefficient:
        is_left_out = hasattr(causal_lm.config.get_text_config(), "output_router_logits") and setting is None
        return 0.0, ["no auxiliary router loss: router_aux_loss_coef is 0 or not in the config"] * is_left_out
    ids = torch.tensor([made_up_tokens(causal_lm.config, 8, random.Random(0))], device=device_of(model))
    with torch.enable_grad(), evaluation_mode(model):
        loss = score(model, scored_batch(ids, ids.roll(-1).T), with_aux_loss=True).aux_loss
    if loss is None:
        if setting is not None:
            raise ValueError(
                f"router_aux_loss_coef={setting}: {name} computes no auxiliary router loss: remove "
                "router_aux_loss_coef, or set it to 0"
            )
        return 0.0, ["no auxiliary router loss: this model class computes none"]
    said = f"plus {coefficient:g} × the auxiliary router loss (aux_loss)"
    if not loss.requires_grad:
        return coefficient, [f"{said}, a constant, because no trained parameter comes before a router"]
    if isinstance(model, PeftModel):
        said += ", whose gradient reaches the adapters even if the routers are frozen"
    return coefficient, [said]
