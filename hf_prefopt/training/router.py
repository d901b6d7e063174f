"""The load-balancing loss of a mixture of experts: its coefficient in the objective, and what is said of it.

As in TRL, it is where the config has `output_router_logits` and a `router_aux_loss_coef` other than 0.
"""

import random

import torch
from peft import PeftModel
from torch import nn

from hf_prefopt.scoring.agreement import device_of, made_up_tokens, scored_batch
from hf_prefopt.scoring.forward import base_causal_lm, score
from hf_prefopt.scoring.modes import evaluation_mode


def aux_loss_coef(model: nn.Module, setting: float | None) -> float:
    """What the auxiliary loss of a model's routers is multiplied by; 0 where there is none.

    Args:
        setting: `router_aux_loss_coef`; `None` leaves it to the model's config.

    Raises:
        ValueError: a coefficient is set for a model that returns no router logits.
    """
    causal_lm = base_causal_lm(model)
    config = causal_lm.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if setting:
            raise ValueError(
                f"router_aux_loss_coef={setting}: {type(causal_lm).__name__} is no mixture of experts that returns its "
                "routers' logits (its config has no output_router_logits), so it has no such loss: leave it out"
            )
        return 0.0
    return float(setting if setting is not None else getattr(config, "router_aux_loss_coef", None) or 0.0)


def settled_aux_loss(model: nn.Module, coefficient: float, setting: float | None) -> tuple[float, list[str]]:
    """Try the auxiliary loss on made-up tokens.

    Args:
        model: a model that `scoring.forward.install_scoring` has been called on, on its device.
        coefficient: `aux_loss_coef`'s. setting: `router_aux_loss_coef`.

    Returns:
        The coefficient, 0 where the model computes no auxiliary loss, and what there is to say, a phrase each.

    Raises:
        ValueError: the model computes none, and a coefficient is set for it.
    """
    causal_lm = base_causal_lm(model)
    name = type(causal_lm).__name__
    if not coefficient:
        is_left_out = hasattr(causal_lm.config.get_text_config(), "output_router_logits") and setting is None
        return 0.0, ["no auxiliary loss of its routers: router_aux_loss_coef is 0 or not in its config"] * is_left_out
    ids = torch.tensor([made_up_tokens(causal_lm.config, 8, random.Random(0))], device=device_of(model))
    with torch.enable_grad(), evaluation_mode(model):
        loss = score(model, scored_batch(ids, ids.roll(-1).T), with_aux_loss=True).aux_loss
    if loss is None:
        if setting is not None:
            raise ValueError(
                f"router_aux_loss_coef={setting}: {name} computes no auxiliary loss of its routers: leave it out, or "
                "set it to 0"
            )
        return 0.0, ["no auxiliary loss of its routers: this class computes none"]
    said = f"plus {coefficient:g} × its routers' auxiliary loss (aux_loss)"
    if not loss.requires_grad:
        return coefficient, [f"{said}, a constant, since nothing that trains comes before a router"]
    if isinstance(model, PeftModel):
        said += ", whose gradient reaches adapters also where the routers are frozen"
    return coefficient, [said]
