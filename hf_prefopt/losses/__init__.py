"""The loss family: pure functions of tensors, found by name through the registry."""

from hf_prefopt.losses.base import LossOutput
from hf_prefopt.losses.dpo import dpo_loss, dpo_norm_loss, hinge_loss, ipo_loss, reference_free_dpo_loss, wpo_loss
from hf_prefopt.losses.kto import kto_pair_loss
from hf_prefopt.losses.reference_free import cpo_loss, orpo_loss, sft_loss, simpo_loss
from hf_prefopt.losses.registry import LossSpec, get_loss, list_losses, register_loss

__all__ = [
    "LossOutput",
    "LossSpec",
    "cpo_loss",
    "dpo_loss",
    "dpo_norm_loss",
    "get_loss",
    "hinge_loss",
    "ipo_loss",
    "kto_pair_loss",
    "list_losses",
    "orpo_loss",
    "reference_free_dpo_loss",
    "register_loss",
    "sft_loss",
    "simpo_loss",
    "wpo_loss",
]
